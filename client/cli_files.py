"""`reftserve files`: data sets and results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from reftserve.client.cli_output import session

app = typer.Typer(no_args_is_help=True, help="Data sets and results.")
COLUMNS = {"id": "ID", "filename": "FILE", "purpose": "PURPOSE", "bytes": "BYTES", "examples": "EXAMPLES"}
Id = Annotated[str, typer.Argument(help="file-...")]
DataFile = Annotated[str, typer.Argument(help="A data set, or the id of an uploaded one")]


@app.command("upload")
def upload(context: typer.Context, path: Path) -> None:
    """Upload a data set in JSON Lines, JSON, CSV or Parquet; it is validated row by row."""
    session(context).show(session(context).client.files.upload(path))


@app.command("check")
def check(
    context: typer.Context,
    training_file: DataFile,
    validation_file: Annotated[str | None, typer.Option(help="Held-out examples, to be looked for leaks")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens that an example may have")] = None,
) -> None:
    """Report on a data set as a training run would find it; a file is uploaded for that, and stays."""
    here = session(context)
    here.show(here.client.check_data(training_file, validation_file=validation_file, max_length=max_length))


@app.command("list")
def list_files(context: typer.Context) -> None:
    """All files, newest first."""
    session(context).show_all(session(context).client.files.list(), COLUMNS)


@app.command("show")
def show(context: typer.Context, file_id: Id) -> None:
    """One file."""
    session(context).show(session(context).client.files.get(file_id))


@app.command("download")
def download(
    context: typer.Context,
    file_id: Id,
    path: Annotated[Path | None, typer.Argument(help="Where to write it; standard output when absent")] = None,
) -> None:
    """A file's content."""
    content = session(context).client.files.content(file_id)
    if path is None:
        sys.stdout.buffer.write(content)
    else:
        path.write_bytes(content)


@app.command("delete")
def delete(context: typer.Context, file_id: Id) -> None:
    """Delete a file."""
    session(context).show(session(context).client.files.delete(file_id))
