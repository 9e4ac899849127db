"""`reftserve train` and `reftserve jobs`: start, follow and control training jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from reftserve.client._sync.jobs import Job
from reftserve.client.cli_output import session
from reftserve.client.exceptions import JobEnded
from reftserve.client.figures import event_lines
from reftserve.client.watch import watch as watch_live

app = typer.Typer(no_args_is_help=True, help="Training runs.")
COLUMNS = {"id": "ID", "status": "STATUS", "suffix": "NAME", "fine_tuned_model": "PUBLISHED", "created_at": "CREATED"}
Id = Annotated[str, typer.Argument(help="ftjob-...")]
INTERRUPTED = 130


def train(
    context: typer.Context,
    training_file: Annotated[
        str, typer.Argument(help="Data set (JSON Lines, JSON, CSV, Parquet), or the id of an uploaded file")
    ],
    name: Annotated[str, typer.Option(help="The intervention's name")],
    validation_file: Annotated[
        str | None, typer.Option(help="Held-out examples; default: a tenth for validation, a tenth for the test")
    ] = None,
    family: Annotated[str | None, typer.Option(help="loreft, noreft, direft, consreft, lobireft or nodireft")] = None,
    layers: Annotated[str | None, typer.Option(help="'all', or indices as in 3,9,15")] = None,
    positions: Annotated[str | None, typer.Option(help="As in f7+l7, l1, prompt")] = None,
    rank: Annotated[int | None, typer.Option()] = None,
    dropout: Annotated[float | None, typer.Option()] = None,
    tied: Annotated[bool | None, typer.Option(help="One set of weights for prefix and suffix")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    early_stopping: Annotated[
        int | None, typer.Option(help="Epochs without a better validation loss before the job ends")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once")] = False,
) -> None:
    """Train an intervention on the server and wait for it. The recipe decides absent options.

    Without --epochs, --batch-size, --learning-rate and --early-stopping the job compares candidates for open options.
    """
    here = session(context)
    job = here.client.train(
        training_file,
        name=name,
        validation_file=validation_file,
        family=family,
        layers=_layers(layers),
        positions=positions,
        rank=rank,
        dropout=dropout,
        tied=tied,
        n_epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        early_stopping_epochs=early_stopping,
        seed=seed,
    )
    if detach:
        print(f"the job runs on the server; follow it with: reftserve jobs watch {job.id}", file=sys.stderr)
    else:
        with _left_running_by_ctrl_c(job):
            job.wait(progress=True)
    here.show(job.data)


def _layers(text: str | None) -> list[int] | str | None:
    if text is None or text == "all":
        return text
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError as cause:
        raise typer.BadParameter(f"--layers {text!r}; expected 'all' or indices as in 3,9,15") from cause


@app.command("list")
def list_jobs(context: typer.Context, limit: Annotated[int, typer.Option(min=1)] = 20) -> None:
    """List jobs, newest first."""
    session(context).show_all(session(context).client.jobs.list(limit=limit), COLUMNS)


@app.command("show")
def show(context: typer.Context, job_id: Id) -> None:
    """Show one job."""
    session(context).show(session(context).client.jobs.get(job_id).data)


@app.command("watch")
def watch(context: typer.Context, job_id: Id) -> None:
    """Follow a job to its end: a live view in a terminal, else one line per event. Exits with 1 unless it succeeds."""
    here = session(context)
    job = here.client.jobs.get(job_id)
    console = Console(highlight=False)
    with _left_running_by_ctrl_c(job):
        if console.is_terminal and not here.as_json:
            watch_live(job, console)
        else:
            _print_events(job, as_json=here.as_json)
    if job.status != "succeeded":
        raise JobEnded(job.data)
    here.show(job.data)


@app.command("events")
def events(context: typer.Context, job_id: Id) -> None:
    """Print each event until the job has ended."""
    here = session(context)
    job = here.client.jobs.get(job_id)
    with _left_running_by_ctrl_c(job):
        _print_events(job, as_json=here.as_json)


def _print_events(job: Job, *, as_json: bool) -> None:
    for event in job.events():
        lines = [json.dumps(event.model_dump(mode="json"))] if as_json else event_lines(event)
        print("\n".join(lines), flush=True)


@contextmanager
def _left_running_by_ctrl_c(job: Job) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"job {job.id} goes on; follow it with: reftserve jobs watch {job.id}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command("cancel")
def cancel(context: typer.Context, job_id: Id) -> None:
    """End a job at once. `retry` restarts it."""
    session(context).show(session(context).client.jobs.get(job_id).cancel().data)


@app.command("pause")
def pause(context: typer.Context, job_id: Id) -> None:
    """Pause a job after its current optimizer step, with a checkpoint."""
    session(context).show(session(context).client.jobs.get(job_id).pause().data)


@app.command("resume")
def resume(context: typer.Context, job_id: Id) -> None:
    """Continue a paused job."""
    session(context).show(session(context).client.jobs.get(job_id).resume().data)


@app.command("retry")
def retry(context: typer.Context, job_id: Id) -> None:
    """Run a failed or cancelled job again, from its last checkpoint if that still exists."""
    session(context).show(session(context).client.jobs.get(job_id).retry().data)
