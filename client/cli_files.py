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
DataFile = Annotated[str, typer.Argument(help="Data set, or the id of an uploaded file")]


@app.command("upload")
def upload(context: typer.Context, path: Path) -> None:
    """Upload a data set (JSON Lines, JSON, CSV, Parquet). The server validates each row."""
    session(context).show(session(context).client.files.upload(path))


@app.command("check")
def check(
    context: typer.Context,
    training_file: DataFile,
    validation_file: Annotated[
        str | None, typer.Option(help="Held-out examples; the report counts leaks into them")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest example, in tokens")] = None,
) -> None:
    """Report on a data set as training would use it. A local file is uploaded first and stays on the server."""
    here = session(context)
    here.show(here.client.check_data(training_file, validation_file=validation_file, max_length=max_length))


@app.command("list")
def list_files(context: typer.Context) -> None:
    """List all files, newest first."""
    session(context).show_all(session(context).client.files.list(), COLUMNS)


@app.command("show")
def show(context: typer.Context, file_id: Id) -> None:
    """Show one file."""
    session(context).show(session(context).client.files.get(file_id))


@app.command("download")
def download(
    context: typer.Context,
    file_id: Id,
    path: Annotated[Path | None, typer.Argument(help="Destination; default: standard output")] = None,
) -> None:
    """Download a file's content."""
    content = session(context).client.files.content(file_id)
    if path is None:
        sys.stdout.buffer.write(content)
    else:
        path.write_bytes(content)


@app.command("delete")
def delete(context: typer.Context, file_id: Id) -> None:
    """Delete a file."""
    session(context).show(session(context).client.files.delete(file_id))
