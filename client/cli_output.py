"""The session of a command: its client, and the format of its output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reftserve.client._sync.client import Client

PIPED_WIDTH = 10_000

_console = Console(highlight=False)
if not _console.is_terminal:
    _console.width = PIPED_WIDTH  # scripts read whole lines


@dataclass(frozen=True)
class Session:
    """The client and the output format that the global options choose."""

    client: Client
    as_json: bool

    def show(self, thing: BaseModel) -> None:
        """Print one object, one line per field that is set."""
        row = thing.model_dump(mode="json")
        if self.as_json:
            print(json.dumps(row))
            return
        table = Table.grid(padding=(0, 2))
        for name, value in row.items():
            if value not in (None, [], {}):
                table.add_row(name, _text(name, value))
        _console.print(table)

    def show_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of text."""
        table = Table(box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        _console.print(table)

    def show_all(self, things: Sequence[BaseModel], columns: Mapping[str, str]) -> None:
        """Print objects as a table. columns: field to heading."""
        rows = [thing.model_dump(mode="json") for thing in things]
        if self.as_json:
            print(json.dumps(rows))
            return
        self.show_table(list(columns.values()), [[_text(name, row[name]) for name in columns] for row in rows])


def session(context: typer.Context) -> Session:
    """Return the session of the running command."""
    found = context.obj
    if not isinstance(found, Session):
        raise TypeError("the command runs outside the reftserve application")
    return found


def parse_use(text: str) -> dict[str, str | float]:
    """Return the intervention that `name[@version][*scale]` names, as JSON."""
    reference, star, scale = text.partition("*")
    name, at, version = reference.partition("@")
    try:
        return {"name": name, **({"version": version} if at else {}), **({"scale": float(scale)} if star else {})}
    except ValueError as cause:
        raise typer.BadParameter(f"{text!r}: {scale!r} is no number; expected name[@version][*scale]") from cause


def _text(field: str, value: Any) -> str:
    if value is None:
        return ""
    if field.endswith("_at"):
        return datetime.fromtimestamp(value).isoformat(sep=" ")
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)
