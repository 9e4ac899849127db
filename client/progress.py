"""A progress bar in the terminal, fed by a job's events."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reftserve.client.schemas import FineTuningEvent


class JobProgress:
    """Steps done of all steps, with the loss, the held-out score and the time to go; on standard error.

    Without a terminal, one line for each event that is no step, and for every held-out score.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, figures="waiting for a worker")
        self._held_out = ""

    def update(self, event: FineTuningEvent) -> None:
        """Show an event."""
        data = event.data or {}
        if "step" not in data:
            self._progress.console.print(event.message)
            return
        if "valid_loss" in data:
            self._held_out = f"  held-out {data['valid_loss']:.3f}"
            if not self._console.is_terminal:
                self._console.print(f"{event.message},{self._held_out}")
        figures = f"loss {data['train_loss']:.3f}{self._held_out}"
        self._progress.update(self._task, completed=data["step"], total=data["total_steps"], figures=figures)

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()
