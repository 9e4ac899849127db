"""`reftserve train` and `reftserve jobs`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from reftserve.client.cli_output import session

app = typer.Typer(no_args_is_help=True, help="Training runs.")
COLUMNS = {"id": "ID", "status": "STATUS", "suffix": "NAME", "fine_tuned_model": "PUBLISHED", "created_at": "CREATED"}
Id = Annotated[str, typer.Argument(help="ftjob-...")]


def train(
    context: typer.Context,
    training_file: Annotated[
        str, typer.Argument(help="A data set (JSON Lines, JSON, CSV, Parquet), or the id of an uploaded one")
    ],
    name: Annotated[str, typer.Option(help="The intervention's name")],
    validation_file: Annotated[
        str | None, typer.Option(help="Held-out examples; a tenth and a tenth when absent")
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
    seed: Annotated[int | None, typer.Option()] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait")] = False,
) -> None:
    """Train an intervention on the server and wait for it; what is absent the recipe decides."""
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
        seed=seed,
    )
    if not detach:
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
    """Jobs, newest first."""
    session(context).show_all(session(context).client.jobs.list(limit=limit), COLUMNS)


@app.command("show")
def show(context: typer.Context, job_id: Id) -> None:
    """One job."""
    session(context).show(session(context).client.jobs.get(job_id).data)


@app.command("watch")
def watch(context: typer.Context, job_id: Id) -> None:
    """Follow a job to its end; exits with 1 when it does not succeed."""
    session(context).show(session(context).client.jobs.get(job_id).wait(progress=True).data)


@app.command("events")
def events(context: typer.Context, job_id: Id) -> None:
    """Print every event as it comes, until the job has ended."""
    for event in session(context).client.jobs.get(job_id).events():
        print(json.dumps(event.model_dump(mode="json")) if session(context).as_json else event.message, flush=True)


@app.command("cancel")
def cancel(context: typer.Context, job_id: Id) -> None:
    """Stop a job before its next optimizer step."""
    session(context).show(session(context).client.jobs.get(job_id).cancel().data)
