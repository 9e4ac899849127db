"""How commands reach the server and show what it says."""

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
    _console.width = PIPED_WIDTH  # nothing that a script reads is cut off


@dataclass(frozen=True)
class Session:
    """What the options of every command amount to."""

    client: Client
    as_json: bool

    def show(self, thing: BaseModel) -> None:
        """One object, a line for each field that is set."""
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
        """A table of text."""
        table = Table(box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        _console.print(table)

    def show_all(self, things: Sequence[BaseModel], columns: Mapping[str, str]) -> None:
        """A table; columns: heading of each field."""
        rows = [thing.model_dump(mode="json") for thing in things]
        if self.as_json:
            print(json.dumps(rows))
            return
        self.show_table(list(columns.values()), [[_text(name, row[name]) for name in columns] for row in rows])


def session(context: typer.Context) -> Session:
    """The session of a running command."""
    found = context.obj
    if not isinstance(found, Session):
        raise TypeError("the command runs outside the reftserve application")
    return found


def parse_use(text: str) -> dict[str, str | float]:
    """An intervention in a composition, `name[@version][*scale]`."""
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
