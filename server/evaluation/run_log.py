"""What is written about a run while it goes on: its status, its items, chunk by chunk, and the sums over them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import select

from reftserve.client.schemas import EvalError, TestingCriterion
from reftserve.server.evaluation.criteria import item_result
from reftserve.server.evaluation.items import Outcome
from reftserve.server.evaluation.tally import Tally
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import EvalItem, EvalRun


class RunLog:
    """Reads and writes the rows of runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def next_run(self) -> EvalRun | None:
        """The oldest run that is not finished, now in progress."""
        query = select(EvalRun).where(EvalRun.status.in_(("queued", "in_progress"))).order_by(EvalRun.id).limit(1)
        with self._database.reading() as session:
            if session.scalar(query) is None:
                return None
        with self._database.session() as session:
            run = session.scalar(query)
            if run is not None:
                run.status = "in_progress"
                run.started_at = run.started_at or int(time.time())
        return run

    def done(self, run_id: str) -> set[int]:
        """Numbers of the items that are kept."""
        with self._database.reading() as session:
            return set(session.scalars(select(EvalItem.number).where(EvalItem.run_id == run_id)))

    def add(self, run_id: str, criteria: Sequence[TestingCriterion], outcomes: Sequence[Outcome]) -> bool:
        """Keep a chunk of items and count them, in one transaction; False when the run is not wanted any more."""
        with self._database.session() as session:
            run = session.get(EvalRun, run_id, with_for_update=True)
            if run is None or run.status != "in_progress":
                return False
            numbers = [outcome.number for outcome in outcomes]
            known = select(EvalItem.number).where(EvalItem.run_id == run_id, EvalItem.number.in_(numbers))
            kept = set(session.scalars(known))
            tally = Tally.model_validate(run.tally)
            session.add_all(_item(run, criteria, tally, o) for o in outcomes if o.number not in kept)
            run.tally = tally.model_dump()
        return True

    def end(self, run_id: str, error: EvalError | None = None) -> None:
        """Complete a run, or fail it with an error, unless it has been cancelled or deleted."""
        with self._database.session() as session:
            run = session.get(EvalRun, run_id, with_for_update=True)
            if run is not None and run.status == "in_progress":
                run.status = "completed" if error is None else "failed"
                run.error = None if error is None else error.model_dump()
                run.finished_at = int(time.time())


def _item(run: EvalRun, criteria: Sequence[TestingCriterion], tally: Tally, outcome: Outcome) -> EvalItem:
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
