"""What is written about a run while it goes on: its status, its items, chunk by chunk, and the sums over them.

Of the servers on one database one is at a run, by a lease like a job's (`training/leases.py`). Every write asks whether
it still is; a log has one run at a time, so that its name is fence enough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from reftserve.client.schemas import EvalError, TestingCriterion
from reftserve.server.evaluation.criteria import item_result
from reftserve.server.evaluation.items import ItemOutcome
from reftserve.server.evaluation.tally import Tally
from reftserve.server.storage.database import Database
from reftserve.server.storage.leases import worker_id
from reftserve.server.storage.tables import EvalItem, EvalRun


class RunRepository:
    """Reads and writes the rows of runs, for one server. lease_s: seconds that a run is its own unless renewed."""

    def __init__(self, database: Database, *, lease_s: float) -> None:
        self._database = database
        self._worker = worker_id()
        self._lease_s = lease_s

    def next_run(self) -> EvalRun | None:
        """The oldest run that is not finished and that no other server is at, now in progress here."""
        with self._database.reading() as session:
            if self._oldest(session) is None:
                return None
        with self._database.session() as session:
            run = self._oldest(session, lock=True)
            if run is not None:
                run.status = "in_progress"
                run.started_at = run.started_at or int(time.time())
                run.lease_worker = self._worker
                run.lease_expires_at = self._database.now(session) + self._lease_s
        return run

    def renew(self) -> None:
        """A sign of life: the run in progress here is so for longer."""
        with self._database.session() as session:
            self._set_lease(session, lease_expires_at=self._database.now(session) + self._lease_s)

    def release(self) -> None:
        """Leave the run in progress here to whoever comes next."""
        with self._database.session() as session:
            self._set_lease(session, lease_worker=None, lease_expires_at=None)

    def done(self, run_id: str) -> set[int]:
        """Numbers of the items that are kept."""
        with self._database.reading() as session:
            return set(session.scalars(select(EvalItem.number).where(EvalItem.run_id == run_id)))

    def add(self, run_id: str, criteria: Sequence[TestingCriterion], outcomes: Sequence[ItemOutcome]) -> bool:
        """Keep a chunk of items and count them, in one transaction; False when the run is not wanted here any more."""
        with self._database.session() as session:
            run = self._held(session, run_id)
            if run is None:
                return False
            numbers = [outcome.number for outcome in outcomes]
            known = select(EvalItem.number).where(EvalItem.run_id == run_id, EvalItem.number.in_(numbers))
            kept = set(session.scalars(known))
            tally = Tally.model_validate(run.tally)
            session.add_all(_item(run, criteria, tally, o) for o in outcomes if o.number not in kept)
            run.tally = tally.model_dump()
        return True

    def end(self, run_id: str, error: EvalError | None = None) -> None:
        """Complete a run, or fail it with an error, unless it has been cancelled, deleted or taken over."""
        with self._database.session() as session:
            run = self._held(session, run_id)
            if run is not None:
                run.status = "completed" if error is None else "failed"
                run.error = None if error is None else error.model_dump()
                run.finished_at = int(time.time())

    def _oldest(self, session: Session, *, lock: bool = False) -> EvalRun | None:
        free = or_(
            EvalRun.lease_worker.is_(None),
            EvalRun.lease_worker == self._worker,
            EvalRun.lease_expires_at < self._database.now(session),
        )
        query = select(EvalRun).where(EvalRun.status.in_(("queued", "in_progress")), free).order_by(EvalRun.id).limit(1)
        return session.scalar(query.with_for_update(skip_locked=True) if lock else query)

    def _held(self, session: Session, run_id: str) -> EvalRun | None:
        run = session.get(EvalRun, run_id, with_for_update=True)
        return run if run and (run.status, run.lease_worker) == ("in_progress", self._worker) else None

    def _set_lease(self, session: Session, **fields: Any) -> None:
        mine = (EvalRun.status == "in_progress", EvalRun.lease_worker == self._worker)
        session.execute(update(EvalRun).where(*mine).values(**fields))


def _item(run: EvalRun, criteria: Sequence[TestingCriterion], tally: Tally, outcome: ItemOutcome) -> EvalItem:
    measured = outcome.measured
    results, error = [], None
    if isinstance(measured, EvalError):
        error = measured.model_dump()
    else:
        results = [item_result(c, measured[str(c.name)]).model_dump(exclude_none=True) for c in criteria]
    return EvalItem(
        run_id=run.id,
        number=outcome.number,
        owner=run.owner,
        status=tally.add(measured),
        output=outcome.output,
        results=results,
        error=error,
        created_at=int(time.time()),
    )
