# Generated from client/_async/evals.py by `make generate`. Change that file instead.
"""Evals: data sets with criteria, and the runs that score a model on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from reftserve.client._sync.connection import Connection
from reftserve.client._sync.files import Files
from reftserve.client._sync.models import Models
from reftserve.client.calls import evals as calls
from reftserve.client.calls.evals import Criteria, ItemStatus
from reftserve.client.calls.files import DataFile
from reftserve.client.calls.generation import Composition
from reftserve.client.concurrency import sleep
from reftserve.client.exceptions import EvalRunEnded
from reftserve.client.schemas import Deleted, Eval, EvalOutputItem, EvalRun, EvalRunStatus

ITEMS_PER_PAGE = 500
POLL_S = 0.5


class Run:
    """A run of an eval. `data` is the run as the server last described it."""

    def __init__(self, connection: Connection, data: EvalRun) -> None:
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

    def refresh(self) -> Run:
        """Ask the server for the run's current state."""
        self.data = self._connection.send(calls.get_run(self.data.eval_id, self.id))
        return self

    def wait(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> Run:
        """Return when all items have scores. Raises EvalRunEnded if the run failed or was canceled, TimeoutError."""
        began = time.monotonic()
        while not (self.refresh()).has_ended:
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise TimeoutError(f"run {self.id} is still {self.status} after {timeout_s} seconds; it goes on")
            sleep(poll_s)
        if self.data.status != "completed":
            raise EvalRunEnded(self.data)
        return self

    def cancel(self) -> Run:
        """Stop the run. Items that the engine is computing are dropped."""
        self.data = self._connection.send(calls.cancel_run(self.data.eval_id, self.id))
        return self

    def items(self, *, status: ItemStatus | None = None) -> Iterator[EvalOutputItem]:
        """Yield the result of each item, in the order of the data set. Fetches page by page."""
        after = None
        while True:
            call = calls.list_items(self.data.eval_id, self.id, status=status, after=after, limit=ITEMS_PER_PAGE)
            page = self._connection.send(call)
            for item in page.data:
                yield item
            if not page.has_more:
                return
            after = page.last_id


class Evals:
    """`client.evals`."""

    def __init__(self, connection: Connection, files: Files, models: Models) -> None:
        self._connection = connection
        self._files = files
        self._models = models

    def create(
        self,
        file: DataFile,
        criteria: Criteria,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Eval:
        """Create an eval. file: path, uploaded file or id. criteria: types, or dicts as in the HTTP reference."""
        file_id = self._files.id_of(file)
        return self._connection.send(calls.create_eval(file_id, criteria, name=name, metadata=metadata))

    def list(self, *, after: str | None = None, limit: int = 20) -> list[Eval]:
        """Return evals, newest first. after: the id of the last eval of the previous page."""
        return self._connection.send(calls.list_evals(after, limit))

    def get(self, eval_id: str) -> Eval:
        """Return one eval with the scores of all its runs."""
        return self._connection.send(calls.get_eval(eval_id))

    def delete(self, eval_id: str) -> Deleted:
        """Delete an eval and its runs."""
        return self._connection.send(calls.delete_eval(eval_id))

    def run(
        self,
        eval_id: str,
        *,
        model: str | None = None,
        interventions: Composition | None = None,
        name: str | None = None,
        max_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Run:
        """Start to score `model` (default: the base) by greedy answers up to `max_tokens`; see the run's `wait`."""
        model = model or self._models.base()
        call = calls.create_run(eval_id, model, interventions, name=name, max_tokens=max_tokens, metadata=metadata)
        return Run(self._connection, self._connection.send(call))

    def get_run(self, eval_id: str, run_id: str) -> Run:
        """Return one run."""
        return Run(self._connection, self._connection.send(calls.get_run(eval_id, run_id)))

    def delete_run(self, eval_id: str, run_id: str) -> Deleted:
        """Delete a run and its items."""
        return self._connection.send(calls.delete_run(eval_id, run_id))
