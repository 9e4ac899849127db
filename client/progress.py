"""A progress bar for a job's events."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from reftserve.client.figures import HELD_OUT, TrainingFigures, pace, scores, step_line
from reftserve.client.schemas import FineTuningEvent


class JobProgress:
    """Shows a bar on standard error; without a terminal, one line per message and per held-out score."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, figures="waiting for a worker")
        self._figures = TrainingFigures()

    def update(self, event: FineTuningEvent) -> None:
        """Add an event to the bar."""
        if not self._figures.add(event):
            self._progress.console.print(event.message)
            return
        newest = self._figures.newest
        # The bar has one line: room for two scores, speed and time.
        figures = ", ".join([*scores(newest)[:2], *pace(newest)[1:]])
        self._progress.update(self._task, completed=newest["step"], total=newest["total_steps"], figures=figures)
        if not self._console.is_terminal:
            for step in event.steps:
                if any(name.startswith(HELD_OUT) for name in step):
                    self._console.print(step_line(step))

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()
