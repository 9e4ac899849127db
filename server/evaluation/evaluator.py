"""The task in the HTTP server's process that executes evaluation runs, the oldest first, chunk by chunk.

A chunk's items go to the engine together, at the lowest priority. A restarted run does only the items without a result.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from reftserve.client.schemas import EvalError
from reftserve.client.schemas.evals import CompletionsDataSource
from reftserve.server.datasets import Example, read_examples
from reftserve.server.errors import EngineFailed, ServerError, Unavailable
from reftserve.server.evaluation.eval_service import EvalService, criteria_of
from reftserve.server.evaluation.items import PRIORITY, ItemOutcome, RunTarget, evaluate
from reftserve.server.evaluation.run_repository import RunRepository
from reftserve.server.inference.generation import RequestContext
from reftserve.server.inference.service import InferenceService, cache_salt
from reftserve.server.registry.names import Reference
from reftserve.server.registry.store import Store
from reftserve.server.storage.leases import (
    RENEWALS_PER_LEASE,
    Lease,
    LeaseLost,
    Leases,
    require_attempts_left,
    worker_id,
)
from reftserve.server.storage.outages import OUTAGES, Outages
from reftserve.server.storage.tables import EvalRun

logger = logging.getLogger(__name__)
CHUNK_ITEMS = 32
CLIENT = "evaluations"  # the engine shares its places fairly among clients
POLL_S = 0.5
ERROR_PAUSE_S = 10.0
ENGINES_PER_CHUNK = 3  # a run fails if this many engines in a row are gone before they take the same items
MAX_FATAL_ITEMS = 3  # a run with more of them would restart the engine again and again, at everybody's cost

T = TypeVar("T")
NumberedExample = tuple[int, Example]


class Evaluator:
    """Executes one run at a time. lease_s: seconds without renewal after which another server may continue it."""

    def __init__(self, store: Store, evals: EvalService, inference: InferenceService, *, lease_s: float) -> None:
        self._store = store
        self._evals = evals
        self._repository = RunRepository(store.database)
        self._leases = Leases(store.database, EvalRun, worker_id(), lease_s=lease_s)
        # One thread, so that a release comes after a `take` that goes on although its caller was cancelled.
        self._lease_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eval-leases")
        self._lease_s = lease_s
        self._inference = inference

    async def run_forever(self) -> None:
        """Execute runs until cancelled; then release the current run at once, for another server."""
        try:
            await self._execute_runs()
        finally:
            await self._release_at_exit()
            self._lease_thread.shutdown(wait=False)

    async def _execute_runs(self) -> None:
        outages = Outages()
        while True:
            try:
                # Free the run that an error of the tables left in hand, for this server or another.
                await self._on_leases(partial(self._leases.release, in_order=False))
                while True:
                    lease = await self._on_leases(self._leases.take) if self._inference.is_ready else None
                    if lease is None:
                        await asyncio.sleep(POLL_S)
                        continue
                    with self._lease_renewed():
                        await self._run(lease)
            except OUTAGES as cause:
                # The run resumes once the database can be used.
                await asyncio.sleep(outages.meet(cause))
            except Exception:
                logger.exception("evaluations failed; the next try is in %s s", ERROR_PAUSE_S)
                await asyncio.sleep(ERROR_PAUSE_S)

    async def _release_at_exit(self) -> None:
        try:
            await self._on_leases(self._leases.release)
        except OUTAGES as cause:
            logger.warning("the lease of a run could not be released and expires by itself: %s", str(cause))

    async def _on_leases(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._lease_thread, call)

    @contextmanager
    def _lease_renewed(self) -> Iterator[None]:
        renewal = asyncio.create_task(self._renew_lease())
        try:
            yield
        finally:
            renewal.cancel()

    async def _renew_lease(self) -> None:
        outages = Outages()
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
            try:
                await self._on_leases(self._leases.renew)
            except OUTAGES as cause:
                # The next renewal may still be in time. If none is, the run notices its lost lease at its next write.
                outages.meet(cause)

    async def _run(self, lease: Lease[EvalRun]) -> None:
        try:
            error = await self._evaluate_or_fail(lease)
            await asyncio.to_thread(self._repository.end, lease, error)
        except LeaseLost as cause:
            logger.info("a run stops: %s", cause)

    async def _evaluate_or_fail(self, lease: Lease[EvalRun]) -> EvalError | None:
        try:
            await self._evaluate(lease)
        except (LeaseLost, *OUTAGES):
            raise
        except ServerError as cause:
            return EvalError(code=cause.code, message=cause.message)
        except Exception:
            logger.exception("evaluation %s failed", lease.id)
            return EvalError(code="internal_error", message="internal error; see the server's log")
        return None

    async def _evaluate(self, lease: Lease[EvalRun]) -> None:
        require_attempts_left(lease, "the run's next items")
        run = await asyncio.to_thread(self._repository.get, lease)
        examples, target = await asyncio.to_thread(self._load, run)
        done = await asyncio.to_thread(self._repository.done, run.id)
        fatal: list[int] = []
        with self._inference.pinned(target.context):
            for chunk in _chunks([item for item in enumerate(examples) if item[0] not in done]):
                outcomes = await self._evaluate_chunk(target, chunk, fatal)
                await asyncio.to_thread(self._repository.add, lease, target.criteria, outcomes)

    async def _evaluate_chunk(
        self, target: RunTarget, chunk: Sequence[NumberedExample], fatal: list[int]
    ) -> list[ItemOutcome]:
        """Evaluate items together. Those that an engine failed with run once more, alone, so only its cause fails.

        fatal: gets the items that failed an engine alone. Raises ServerError after MAX_FATAL_ITEMS of them.
        """
        found = await self._attempt(target, chunk)
        for number, example in chunk:
            if isinstance(found[number], ItemOutcome):
                continue
            found |= await self._attempt(target, [(number, example)])
            failure = found[number]
            if isinstance(failure, EngineFailed):
                fatal.append(number)
                if len(fatal) >= MAX_FATAL_ITEMS:
                    raise ServerError(
                        f"items {', '.join(map(str, fatal))} failed twice in the engine: {failure.message}",
                        code=failure.code,
                    )
                found[number] = ItemOutcome(number, EvalError(code=failure.code, message=failure.message))
        return [outcome for number, _ in chunk if isinstance(outcome := found[number], ItemOutcome)]

    async def _attempt(
        self, target: RunTarget, items: Sequence[NumberedExample]
    ) -> dict[int, ItemOutcome | EngineFailed]:
        """Evaluate items together; return outcomes, and the errors of those that an engine failed with, by number.

        Items whose engine was not there are tried again. Raises their error after ENGINES_PER_CHUNK engines.
        """
        found: dict[int, ItemOutcome | EngineFailed] = {}
        left = list(items)
        for last in (number == ENGINES_PER_CHUNK for number in range(1, ENGINES_PER_CHUNK + 1)):
            while not self._inference.is_ready:
                await asyncio.sleep(POLL_S)
            tasks = [evaluate(self._inference, target, number, example) for number, example in left]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            again = []
            for item, result in zip(left, results, strict=True):
                if isinstance(result, ItemOutcome | EngineFailed):
                    found[item[0]] = result
                elif isinstance(result, Unavailable) and not last:
                    again.append(item)
                else:
                    raise result
            left = again
            if not left:
                break
        return found

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
