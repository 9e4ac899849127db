"""`client.evals`: data sets with criteria, and runs to wait for; blocking and asynchronous."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from reftserve.client import calls
from reftserve.client.calls import Call, Criteria, Interventions
from reftserve.client.exceptions import EvalRunEnded
from reftserve.client.schemas import Deleted, Eval, EvalOutputItem, EvalRun, EvalRunStatus, Page

if TYPE_CHECKING:
    from reftserve.client.async_client import AsyncClient
    from reftserve.client.client import Client, TrainingFile

ItemStatus = Literal["pass", "fail", "error"]
ITEMS_PER_PAGE = 500
POLL_S = 0.5


class _RunState:
    """What was last heard of a run; `data` is all of it."""

    def __init__(self, data: EvalRun) -> None:
        self.data = data

    @property
    def id(self) -> str:
        """`evalrun_...`."""
        return self.data.id

    @property
    def status(self) -> EvalRunStatus:
        """As of the last refresh."""
        return self.data.status

    @property
    def has_ended(self) -> bool:
        """Whether it completed, failed or was canceled."""
        return self.data.status not in ("queued", "in_progress")

    @property
    def scores(self) -> dict[str, float | None]:
        """Each criterion's score over the items done, by its name."""
        return self.data.scores

    def _raise_when_late(self, began: float, timeout_s: float | None) -> None:
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            raise TimeoutError(f"run {self.id} is still {self.status} after {timeout_s} seconds; it goes on")

    def _raise_unless_completed(self) -> None:
        if self.data.status != "completed":
            raise EvalRunEnded(self.data)

    def _page(self, status: ItemStatus | None, after: str | None) -> Call[Page[EvalOutputItem]]:
        return calls.list_eval_items(self.data.eval_id, self.id, status=status, after=after, limit=ITEMS_PER_PAGE)


class Run(_RunState):
    """A run of an eval."""

    def __init__(self, client: Client, data: EvalRun) -> None:
        super().__init__(data)
        self._client = client

    def refresh(self) -> Run:
        """Ask the server how it stands."""
        self.data = self._client.send(calls.get_eval_run(self.data.eval_id, self.id))
        return self

    def wait(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> Run:
        """Until it has scores for all items.

        Raises EvalRunEnded when it failed or was canceled, TimeoutError after `timeout_s`; the run goes on then.
        """
        began = time.monotonic()
        while not self.refresh().has_ended:
            self._raise_when_late(began, timeout_s)
            time.sleep(poll_s)
        self._raise_unless_completed()
        return self

    def cancel(self) -> Run:
        """Stop it; items that are at the engine are not kept."""
        self.data = self._client.send(calls.cancel_eval_run(self.data.eval_id, self.id))
        return self

    def items(self, *, status: ItemStatus | None = None) -> Iterator[EvalOutputItem]:
        """What became of each item, in the order of the data set; fetched page by page."""
        after = None
        while True:
            page = self._client.send(self._page(status, after))
            yield from page.data
            if not page.has_more:
                return
            after = page.last_id


class AsyncRun(_RunState):
    """Run for asyncio."""

    def __init__(self, client: AsyncClient, data: EvalRun) -> None:
        super().__init__(data)
        self._client = client

    async def refresh(self) -> AsyncRun:
        """Ask the server how it stands."""
        self.data = await self._client.send(calls.get_eval_run(self.data.eval_id, self.id))
        return self

    async def wait(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> AsyncRun:
        """Until it has scores for all items.

        Raises EvalRunEnded when it failed or was canceled, TimeoutError after `timeout_s`; the run goes on then.
        """
        began = time.monotonic()
        while not (await self.refresh()).has_ended:
            self._raise_when_late(began, timeout_s)
            await asyncio.sleep(poll_s)
        self._raise_unless_completed()
        return self

    async def cancel(self) -> AsyncRun:
        """Stop it; items that are at the engine are not kept."""
        self.data = await self._client.send(calls.cancel_eval_run(self.data.eval_id, self.id))
        return self

    async def items(self, *, status: ItemStatus | None = None) -> AsyncIterator[EvalOutputItem]:
        """What became of each item, in the order of the data set; fetched page by page."""
        after = None
        while True:
            page = await self._client.send(self._page(status, after))
            for item in page.data:
                yield item
            if not page.has_more:
                return
            after = page.last_id


class Evals:
    """`client.evals`: data sets with criteria, and their runs."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        file: TrainingFile,
        criteria: Criteria,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Eval:
        """A data set, a path, an uploaded file or its id, with criteria: types, or dicts as in the HTTP reference."""
        file_id = self._client._file_id(file)
        return self._client.send(calls.create_eval(file_id, criteria, name=name, metadata=metadata))

    def list(self, *, after: str | None = None, limit: int = 20) -> list[Eval]:
        """Evals, newest first; `after` continues behind an eval's id."""
        return self._client.send(calls.list_evals(after, limit))

    def get(self, eval_id: str) -> Eval:
        """One eval, with the scores of all its runs."""
        return self._client.send(calls.get_eval(eval_id))

    def delete(self, eval_id: str) -> Deleted:
        """Delete an eval and its runs."""
        return self._client.send(calls.delete_eval(eval_id))

    def run(
        self,
        eval_id: str,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        name: str | None = None,
        max_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Run:
        """Start to score the base, or what `model` and `interventions` name; see `Run.wait`.

        max_tokens: of a greedy answer.
        """
        model = model or self._client.base_model
        call = calls.create_eval_run(eval_id, model, interventions, name=name, max_tokens=max_tokens, metadata=metadata)
        return Run(self._client, self._client.send(call))

    def get_run(self, eval_id: str, run_id: str) -> Run:
        """One run, to wait for."""
        return Run(self._client, self._client.send(calls.get_eval_run(eval_id, run_id)))

    def delete_run(self, eval_id: str, run_id: str) -> Deleted:
        """Delete a run and its items."""
        return self._client.send(calls.delete_eval_run(eval_id, run_id))


class AsyncEvals:
    """`client.evals` for asyncio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        file: TrainingFile,
        criteria: Criteria,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Eval:
        """A data set, a path, an uploaded file or its id, with criteria: types, or dicts as in the HTTP reference."""
        file_id = await self._client._file_id(file)
        return await self._client.send(calls.create_eval(file_id, criteria, name=name, metadata=metadata))

    async def list(self, *, after: str | None = None, limit: int = 20) -> list[Eval]:
        """Evals, newest first; `after` continues behind an eval's id."""
        return await self._client.send(calls.list_evals(after, limit))

    async def get(self, eval_id: str) -> Eval:
        """One eval, with the scores of all its runs."""
        return await self._client.send(calls.get_eval(eval_id))

    async def delete(self, eval_id: str) -> Deleted:
        """Delete an eval and its runs."""
        return await self._client.send(calls.delete_eval(eval_id))

    async def run(
        self,
        eval_id: str,
        *,
        model: str | None = None,
        interventions: Interventions | None = None,
        name: str | None = None,
        max_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncRun:
        """Start to score the base, or what `model` and `interventions` name; see `AsyncRun.wait`.

        max_tokens: of a greedy answer.
        """
        model = model or await self._client.base_model()
        call = calls.create_eval_run(eval_id, model, interventions, name=name, max_tokens=max_tokens, metadata=metadata)
        return AsyncRun(self._client, await self._client.send(call))

    async def get_run(self, eval_id: str, run_id: str) -> AsyncRun:
        """One run, to wait for."""
        return AsyncRun(self._client, await self._client.send(calls.get_eval_run(eval_id, run_id)))

    async def delete_run(self, eval_id: str, run_id: str) -> Deleted:
        """Delete a run and its items."""
        return await self._client.send(calls.delete_eval_run(eval_id, run_id))
