"""The rows of runs in progress. Each write raises LeaseLost, and writes nothing, if the run has been taken away."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import select

from reftserve.client.schemas import EvalError, TestingCriterion
from reftserve.server.evaluation.criteria import item_result
from reftserve.server.evaluation.items import ItemOutcome
from reftserve.server.evaluation.tally import Tally
from reftserve.server.storage.database import Database
from reftserve.server.storage.leases import Lease, release_lease, require_lease
from reftserve.server.storage.tables import EvalItem, EvalRun


class RunRepository:
    """Reads and writes the rows of runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, lease: Lease[EvalRun]) -> EvalRun:
        """Return the lease's run."""
        with self._database.reading() as session:
            return require_lease(session, lease, lock=False)

    def done(self, run_id: str) -> set[int]:
        """Return the numbers of the stored items."""
        with self._database.reading() as session:
            return set(session.scalars(select(EvalItem.number).where(EvalItem.run_id == run_id)))

    def add(self, lease: Lease[EvalRun], criteria: Sequence[TestingCriterion], outcomes: Sequence[ItemOutcome]) -> None:
        """Store a chunk of items and count them, in one transaction."""
        with self._database.session() as session:
            run = require_lease(session, lease)
            run.attempts = 0
            numbers = [outcome.number for outcome in outcomes]
            known = select(EvalItem.number).where(EvalItem.run_id == run.id, EvalItem.number.in_(numbers))
            stored = set(session.scalars(known))
            tally = Tally.model_validate(run.tally)
            session.add_all(_item(run, criteria, tally, o) for o in outcomes if o.number not in stored)
            run.tally = tally.model_dump()

    def end(self, lease: Lease[EvalRun], error: EvalError | None = None) -> None:
        """Complete the run, or fail it with an error."""
        with self._database.session() as session:
            run = require_lease(session, lease)
            run.status = "completed" if error is None else "failed"
            run.error = None if error is None else error.model_dump()
            run.finished_at = int(time.time())
            release_lease(run)


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
