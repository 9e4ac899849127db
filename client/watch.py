"""A live view of a job in the terminal: status, figures, and the curve of its losses."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reftserve.client._sync.jobs import Job
from reftserve.client.curve import MARK, draw
from reftserve.client.figures import TrainingFigures, pace, scores
from reftserve.client.schemas import FineTuningEvent

CURVE_HEIGHT = 15
# Lines of the view besides the curve, and one spare line so that the terminal does not scroll.
OTHER_LINES = 8


def watch(job: Job, console: Console) -> None:
    """Show a job until it has ended. console: a terminal."""
    view = JobView(job)
    with Live(view, console=console):
        for event in job.events():
            view.add(event)
            if event.type == "message" and not job.has_ended:
                job.refresh()  # most messages come with a new status


class JobView:
    """The view of a job. rich draws it from another thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._figures = TrainingFigures()
        self._message = ""

    def add(self, event: FineTuningEvent) -> None:
        """Add an event to the view."""
        if not self._figures.add(event):
            self._message = event.message

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        job, newest = self._job, dict(self._figures.newest)
        heading = Table.grid(padding=(0, 2))
        heading.add_row(job.id, Text(job.data.suffix or "", "bold"), Text(job.status, "cyan"))
        yield heading
        if newest:
            steps = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=newest["total_steps"], completed=newest["step"], width=24)
            steps.add_row(f"step {newest['step']}/{newest['total_steps']}", bar)
            yield steps
            yield Text(", ".join(pace(newest)))
            yield Text(", ".join(scores(newest)))
            yield from self._curve(options.max_width, min(CURVE_HEIGHT, console.height - OTHER_LINES))
        yield Text(self._message, "dim", no_wrap=True, overflow="ellipsis")

    def _curve(self, width: int, height: int) -> RenderResult:
        # Copies: the other thread may add a step during the drawing.
        lines = draw(dict(self._figures.losses), dict(self._figures.held_out_losses), width, height)
        for line in lines:
            curve = Text(line, no_wrap=True)
            curve.highlight_regex(MARK, "yellow")
            yield curve
        if lines:
            yield Text.assemble("training loss, ", (MARK, "yellow"), " held-out loss", style="dim")
