"""Runs evaluations: a task beside the HTTP server that takes the oldest unfinished run, and its items chunk by chunk.

The items of a chunk are at the engine together, behind every other request; then the chunk is kept in one transaction.
So a run that a restart interrupts goes on with the items that it lacks, unless another base is served since.
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
from reftserve.server.storage.tables import EvalRun

logger = logging.getLogger(__name__)
CHUNK_ITEMS = 32
POLL_S = 0.5
RENEWALS_PER_LEASE = 4
TABLES_POLL_S = 10.0
ENGINES_PER_CHUNK = 3  # a chunk that so many engines die of fails its run

Numbered = tuple[int, Example]


class Evaluator:
    """One for a server: runs come one after another, their items many at a time.

    lease_s: seconds without a sign of life after which another server goes on with a run.
    """

    def __init__(self, store: Store, evals: EvalService, inference: InferenceService, *, lease_s: float) -> None:
        self._store = store
        self._evals = evals
        self._log = RunRepository(store.database, lease_s=lease_s)
        self._lease_s = lease_s
        self._inference = inference

    async def run_forever(self) -> None:
        """Take runs as they come; when this is cancelled, the one in hand is free at once for another server."""
        try:
            await self._take_runs()
        finally:
            await asyncio.to_thread(self._log.release)

    async def _take_runs(self) -> None:
        while True:
            try:
                run = await asyncio.to_thread(self._log.next_run) if self._inference.is_ready else None
                if run is not None:
                    with self._beating():
                        await self._run(run)
                    continue
            except Exception:
                # The tables themselves cannot be read or written; the run goes on once they can.
                logger.exception("evaluations wait")
                await asyncio.sleep(TABLES_POLL_S)
            await asyncio.sleep(POLL_S)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        beat = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beat.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
            try:
                await asyncio.to_thread(self._log.renew)
            except (SQLAlchemyError, StorageFull):
                # The next beat tries again; if none comes through in time, the lease is lost, and the run notices.
                logger.exception("the lease could not be renewed")

    async def _run(self, run: EvalRun) -> None:
        error: EvalError | None = None
        try:
            if not await self._evaluate(run):
                return
        except ServerError as cause:
            error = EvalError(code=cause.code, message=cause.message)
        except DATABASE_ERRORS:
            raise
        except Exception:
            logger.exception("evaluation %s failed", run.id)
            error = EvalError(code="internal_error", message="internal error; the server's log says more")
        await asyncio.to_thread(self._log.end, run.id, error)

    async def _evaluate(self, run: EvalRun) -> bool:
        """Evaluate the items that the run lacks; False when it is not wanted any more.

        Raises ServerError when file, interventions or base are not there any more, or engines die again and again.
        """
        examples, target = await asyncio.to_thread(self._open, run)
        done = await asyncio.to_thread(self._log.done, run.id)
        with self._inference.pinned(target.context):
            for chunk in _chunks([item for item in enumerate(examples) if item[0] not in done]):
                outcomes = await self._evaluate_chunk(target, chunk)
                if not await asyncio.to_thread(self._log.add, run.id, target.criteria, outcomes):
                    return False
        return True

    async def _evaluate_chunk(self, target: RunTarget, chunk: Sequence[Numbered]) -> list[ItemOutcome]:
        async def once() -> list[ItemOutcome]:
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
        return await retrying(once)

    def _open(self, run: EvalRun) -> tuple[list[Example], RunTarget]:
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
            context=RequestContext(versions, cache_salt(run.owner), PRIORITY),
            max_tokens=source.sampling_params.max_completion_tokens,
        )
        return read_examples(self._store.files.path(file)), target


def _chunks(items: list[Numbered]) -> Iterator[tuple[Numbered, ...]]:
    # itertools.batched came with Python 3.12.
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, CHUNK_ITEMS)):
        yield chunk
