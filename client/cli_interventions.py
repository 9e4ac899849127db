"""`reftserve interventions`: list, show, upload, download and delete them; set aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftserve.client.cli_output import session

app = typer.Typer(no_args_is_help=True, help="Published interventions, their versions and aliases.")
COLUMNS = {"name": "NAME", "versions": "VERSIONS", "aliases": "ALIASES"}
Reference = Annotated[str, typer.Argument(help="name, name@version or name@alias")]


@app.command("list")
def list_interventions(context: typer.Context) -> None:
    """List all interventions."""
    session(context).show_all(session(context).client.interventions.list(), COLUMNS)


@app.command("show")
def show(context: typer.Context, reference: Reference) -> None:
    """Show an intervention; with `@`, one version with its manifest."""
    interventions = session(context).client.interventions
    name, at, version = reference.partition("@")
    session(context).show(interventions.version(name, version) if at else interventions.get(name))


@app.command("upload")
def upload(
    context: typer.Context, name: str, artifact: Annotated[Path, typer.Argument(help="Folder, or a zip of it")]
) -> None:
    """Publish an artifact as the next version of a name."""
    session(context).show(session(context).client.interventions.upload(name, artifact))


@app.command("download")
def download(context: typer.Context, reference: Reference, folder: Path) -> None:
    """Write a version's artifact into a folder."""
    name, _, version = reference.partition("@")
    print(session(context).client.interventions.download(name, folder, version=version or "latest"))


@app.command("delete")
def delete(
    context: typer.Context,
    reference: Reference,
    force: Annotated[bool, typer.Option("--force", help="Even while running requests use it")] = False,
) -> None:
    """Delete an intervention; with `@`, one version of it."""
    name, _, version = reference.partition("@")
    session(context).show(session(context).client.interventions.delete(name, version or None, force=force))


@app.command("alias")
def alias(context: typer.Context, name: str, alias: str, version: int) -> None:
    """Point an alias at a version."""
    session(context).show(session(context).client.interventions.alias(name, alias, version))


@app.command("unalias")
def unalias(context: typer.Context, name: str, alias: str) -> None:
    """Remove an alias."""
    session(context).show(session(context).client.interventions.delete_alias(name, alias))
