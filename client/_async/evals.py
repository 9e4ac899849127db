"""Evals: data sets with criteria, and the runs that score a model on them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping

from reftserve.client._async.connection import AsyncConnection
from reftserve.client._async.files import AsyncFiles
from reftserve.client._async.models import AsyncModels
from reftserve.client.calls import evals as calls
from reftserve.client.calls.evals import Criteria, ItemStatus
from reftserve.client.calls.files import DataFile
from reftserve.client.calls.generation import Composition
from reftserve.client.concurrency import async_sleep
from reftserve.client.exceptions import EvalRunEnded
from reftserve.client.schemas import Deleted, Eval, EvalOutputItem, EvalRun, EvalRunStatus

ITEMS_PER_PAGE = 500
POLL_S = 0.5


class AsyncRun:
    """A run of an eval. `data` is the run as the server last described it."""

    def __init__(self, connection: AsyncConnection, data: EvalRun) -> None:
        self.data = data
        self._connection = connection

    @property
    def id(self) -> str:
        """`evalrun_...`."""
        return self.data.id

    @property
    def status(self) -> EvalRunStatus:
        """The status at the last refresh."""
        return self.data.status

    @property
    def has_ended(self) -> bool:
        """Whether the run completed, failed or was canceled."""
        return self.data.status not in ("queued", "in_progress")

    @property
    def scores(self) -> dict[str, float | None]:
        """The score of each criterion over the finished items, by the criterion's name."""
        return self.data.scores

    async def refresh(self) -> AsyncRun:
        """Ask the server for the run's current state."""
        self.data = await self._connection.send(calls.get_run(self.data.eval_id, self.id))
        return self

    async def wait(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> AsyncRun:
        """Return when all items have scores. Raises EvalRunEnded if the run failed or was canceled, TimeoutError."""
        began = time.monotonic()
        while not (await self.refresh()).has_ended:
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise TimeoutError(f"run {self.id} is still {self.status} after {timeout_s} seconds; it goes on")
            await async_sleep(poll_s)
        if self.data.status != "completed":
            raise EvalRunEnded(self.data)
        return self

    async def cancel(self) -> AsyncRun:
        """Stop the run. Items that the engine is computing are dropped."""
        self.data = await self._connection.send(calls.cancel_run(self.data.eval_id, self.id))
        return self

    async def items(self, *, status: ItemStatus | None = None) -> AsyncIterator[EvalOutputItem]:
        """Yield the result of each item, in the order of the data set. Fetches page by page."""
        after = None
        while True:
            call = calls.list_items(self.data.eval_id, self.id, status=status, after=after, limit=ITEMS_PER_PAGE)
            page = await self._connection.send(call)
            for item in page.data:
                yield item
            if not page.has_more:
                return
            after = page.last_id


class AsyncEvals:
    """`client.evals`."""

    def __init__(self, connection: AsyncConnection, files: AsyncFiles, models: AsyncModels) -> None:
        self._connection = connection
        self._files = files
        self._models = models

    async def create(
        self,
        file: DataFile,
        criteria: Criteria,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Eval:
        """Create an eval. file: path, uploaded file or id. criteria: types, or dicts as in the HTTP reference."""
        file_id = await self._files.id_of(file)
        return await self._connection.send(calls.create_eval(file_id, criteria, name=name, metadata=metadata))

    async def list(self, *, after: str | None = None, limit: int = 20) -> list[Eval]:
        """Return evals, newest first. after: the id of the last eval of the previous page."""
        return await self._connection.send(calls.list_evals(after, limit))

    async def get(self, eval_id: str) -> Eval:
        """Return one eval with the scores of all its runs."""
        return await self._connection.send(calls.get_eval(eval_id))

    async def delete(self, eval_id: str) -> Deleted:
        """Delete an eval and its runs."""
        return await self._connection.send(calls.delete_eval(eval_id))

    async def run(
        self,
        eval_id: str,
        *,
        model: str | None = None,
        interventions: Composition | None = None,
        name: str | None = None,
        max_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncRun:
        """Start to score `model` (default: the base) by greedy answers up to `max_tokens`; see the run's `wait`."""
        model = model or await self._models.base()
        call = calls.create_run(eval_id, model, interventions, name=name, max_tokens=max_tokens, metadata=metadata)
        return AsyncRun(self._connection, await self._connection.send(call))

    async def get_run(self, eval_id: str, run_id: str) -> AsyncRun:
        """Return one run."""
        return AsyncRun(self._connection, await self._connection.send(calls.get_run(eval_id, run_id)))

    async def delete_run(self, eval_id: str, run_id: str) -> Deleted:
        """Delete a run and its items."""
        return await self._connection.send(calls.delete_run(eval_id, run_id))
