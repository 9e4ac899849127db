"""The task in the HTTP server's process that executes evaluation runs, the oldest first, chunk by chunk.

A chunk's items go to the engine together, at the lowest priority. A restarted run does only the items without a result.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from reftserve.client.schemas import EvalError
from reftserve.client.schemas.evals import CompletionsDataSource
from reftserve.server.datasets import Example, read_examples
from reftserve.server.errors import ServerError, StorageFull, Unavailable
from reftserve.server.evaluation.eval_service import EvalService, criteria_of
from reftserve.server.evaluation.items import PRIORITY, ItemOutcome, RunTarget, evaluate
from reftserve.server.evaluation.run_repository import RunRepository
from reftserve.server.inference.generation import RequestContext
from reftserve.server.inference.service import InferenceService, cache_salt
from reftserve.server.registry.names import Reference
from reftserve.server.registry.store import Store
from reftserve.server.storage.database import DATABASE_ERRORS
from reftserve.server.storage.leases import (
    RENEWALS_PER_LEASE,
    Lease,
    LeaseLost,
    Leases,
    require_attempts_left,
    worker_id,
)
from reftserve.server.storage.tables import EvalRun

logger = logging.getLogger(__name__)
CHUNK_ITEMS = 32
CLIENT = "evaluations"  # the engine shares its places fairly among clients
POLL_S = 0.5
TABLES_POLL_S = 10.0
ENGINES_PER_CHUNK = 3  # a run fails if this many engines die while they compute the same chunk

NumberedExample = tuple[int, Example]


class Evaluator:
    """Executes one run at a time. lease_s: seconds without renewal after which another server may continue it."""

    def __init__(self, store: Store, evals: EvalService, inference: InferenceService, *, lease_s: float) -> None:
        self._store = store
        self._evals = evals
        self._repository = RunRepository(store.database)
        self._leases = Leases(store.database, EvalRun, worker_id(), lease_s=lease_s)
        self._lease_s = lease_s
        self._inference = inference

    async def run_forever(self) -> None:
        """Execute runs until cancelled; then release the current run at once, for another server."""
        try:
            await self._execute_runs()
        finally:
            await asyncio.to_thread(self._leases.release)

    async def _execute_runs(self) -> None:
        while True:
            try:
                # Free the run that an error of the tables left in hand, for this server or another.
                await asyncio.to_thread(self._leases.release, in_order=False)
                while True:
                    lease = await asyncio.to_thread(self._leases.take) if self._inference.is_ready else None
                    if lease is None:
                        await asyncio.sleep(POLL_S)
                        continue
                    with self._lease_renewed():
                        await self._run(lease)
            except Exception:
                # The tables cannot be read or written. The run resumes once they can.
                logger.exception("evaluations wait for the database; the next try is in %s s", TABLES_POLL_S)
                await asyncio.sleep(TABLES_POLL_S)

    @contextmanager
    def _lease_renewed(self) -> Iterator[None]:
        renewal = asyncio.create_task(self._renew_lease())
        try:
            yield
        finally:
            renewal.cancel()

    async def _renew_lease(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
            try:
                await asyncio.to_thread(self._leases.renew)
            except (SQLAlchemyError, StorageFull):
                # The next renewal may still be in time. If none is, the run notices its lost lease at its next write.
                logger.exception("the lease could not be renewed")

    async def _run(self, lease: Lease[EvalRun]) -> None:
        try:
            error = await self._evaluate_or_fail(lease)
            await asyncio.to_thread(self._repository.end, lease, error)
        except LeaseLost as cause:
            logger.info("a run stops: %s", cause)

    async def _evaluate_or_fail(self, lease: Lease[EvalRun]) -> EvalError | None:
        try:
            await self._evaluate(lease)
        except ServerError as cause:
            return EvalError(code=cause.code, message=cause.message)
        except (LeaseLost, *DATABASE_ERRORS):
            raise
        except Exception:
            logger.exception("evaluation %s failed", lease.id)
            return EvalError(code="internal_error", message="internal error; see the server's log")
        return None

    async def _evaluate(self, lease: Lease[EvalRun]) -> None:
        require_attempts_left(lease, "the run's next items")
        run = await asyncio.to_thread(self._repository.get, lease)
        examples, target = await asyncio.to_thread(self._load, run)
        done = await asyncio.to_thread(self._repository.done, run.id)
        with self._inference.pinned(target.context):
            for chunk in _chunks([item for item in enumerate(examples) if item[0] not in done]):
                outcomes = await self._evaluate_chunk(target, chunk)
                await asyncio.to_thread(self._repository.add, lease, target.criteria, outcomes)

    async def _evaluate_chunk(self, target: RunTarget, chunk: Sequence[NumberedExample]) -> list[ItemOutcome]:
        async def attempt() -> list[ItemOutcome]:
            while not self._inference.is_ready:
                await asyncio.sleep(POLL_S)
            tasks = [evaluate(self._inference, target, number, example) for number, example in chunk]
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            return [outcome for outcome in outcomes if isinstance(outcome, ItemOutcome)]

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable), stop=stop_after_attempt(ENGINES_PER_CHUNK), reraise=True
        )
        return await retrying(attempt)

    def _load(self, run: EvalRun) -> tuple[list[Example], RunTarget]:
        self._evals.require_served(run)
        row = self._evals.get(run.owner, run.eval_id)
        file = self._store.files.get(run.owner, row.file_id)
        source = CompletionsDataSource.model_validate(run.data_source)
        versions = [
            (self._store.interventions.resolve(run.owner, Reference(use["name"], use["version"])), use["scale"])
            for use in run.uses
        ]
        target = RunTarget(
            run_id=run.id,
            criteria=criteria_of(row),
            context=RequestContext(versions, CLIENT, cache_salt(run.owner), PRIORITY, is_metered=False),
            max_tokens=source.sampling_params.max_completion_tokens,
        )
        return read_examples(self._store.files.path(file)), target


def _chunks(items: list[NumberedExample]) -> Iterator[tuple[NumberedExample, ...]]:
    # itertools.batched came with Python 3.12.
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, CHUNK_ITEMS)):
        yield chunk
