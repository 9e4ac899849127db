"""The session of a command: its client, and the format of its output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reftserve.client._sync.client import Client

URL_HELP = "The server's address, such as http://127.0.0.1:8000"
JSON_HELP = "Print results as JSON"

_console = Console(highlight=False)


@dataclass
class Session:
    """The server and the output format that the global options choose; each command may have them too."""

    url: str
    api_key: str | None
    as_json: bool

    @cached_property
    def client(self) -> Client:
        """The client of the server. Raises AddressError."""
        return Client(self.url, api_key=self.api_key)

    def close(self) -> None:
        """Close the client's connections."""
        if "client" in self.__dict__:
            self.client.close()

    def show(self, thing: BaseModel) -> None:
        """Print one object, one line per field that is set; fields of objects inside have dotted names."""
        row = thing.model_dump(mode="json")
        if self.as_json:
            print(json.dumps(row))
            return
        fields = [(name, _text(name, value)) for name, value in _flat(row)]
        if not _console.is_terminal:
            _print_tabbed(fields)
            return
        table = Table.grid(padding=(0, 2))
        for name, text in fields:
            table.add_row(name, escape(text))
        _console.print(table)

    def show_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of text; columns are separated by tabs unless a terminal shows it."""
        if not _console.is_terminal:
            _print_tabbed([headings, *rows])
            return
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


def _print_tabbed(rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        print("\t".join(" ".join(text.split()) for text in row))


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from _flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}.")
        elif value not in (None, []):
            yield f"{prefix}{name}", value


def takes_session_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--url` and `--json` to a command, which win over those before its name."""

    @wraps(command)
    def run(context: typer.Context, option_url: str | None, option_json: bool, **arguments: Any) -> None:
        here = session(context)
        here.url = option_url or here.url
        here.as_json |= option_json
        command(context, **arguments)

    options = {
        "option_url": Annotated[str | None, typer.Option("--url", help=URL_HELP, show_default=False)],
        "option_json": Annotated[bool, typer.Option("--json", help=JSON_HELP)],
    }
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=options[name])
        for name, default in {"option_url": None, "option_json": False}.items()
    ]
    hints = get_type_hints(command, include_extras=True)
    own = [one.replace(annotation=hints[one.name]) for one in signature(command).parameters.values()]
    del run.__wrapped__  # typer would follow it to the command without these options
    run.__signature__ = Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**hints, **options}
    return run


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
    if field.endswith("_at") and isinstance(value, (int, float)):
        return datetime.fromtimestamp(value).isoformat(sep=" ")
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(field, item) for item in value)
    return str(value)
