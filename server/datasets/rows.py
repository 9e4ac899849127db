"""Rows of a data set, checked by hand: an upload is checked in a new process, whose start pydantic would double.

    CHAT           {"messages": [...]}                       one example for each assistant turn but a first message
    COMPLETION     {"prompt", "completion"}                  one example
    INSTRUCTION    {"instruction", "input"?, "output"}       one example; Alpaca's fields

Null means "not given". An unknown field is an error, so that a misspelt one is not ignored, unless it is null, `[]` or
`{}`: exports of tables fill the fields of other rows with these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reftserve.server.datasets.conversations import chat_examples
from reftserve.server.datasets.examples import Example, Instruction
from reftserve.server.datasets.field_checks import json_kind, names, require_text, unknown_fields
from reftserve.server.datasets.foreign_rows import advice
from reftserve.server.datasets.source_location import SourceLocation

KINDS = "messages, or prompt and completion, or instruction, input (optional) and output"


@dataclass(frozen=True)
class RowKind:
    """The fields of one kind of row."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Return all fields."""
        return self.required + self.optional

    @property
    def text(self) -> str:
        """Return the fields in words."""
        optional = "".join(f", {name} (optional)" for name in self.optional)
        return f"{' and '.join(self.required)}{optional}"


CHAT = RowKind(("messages",))
COMPLETION = RowKind(("prompt", "completion"))
INSTRUCTION = RowKind(("instruction", "output"), ("input",))
FIELDS = frozenset(CHAT.fields + COMPLETION.fields + INSTRUCTION.fields)


def row_kind(fields: Iterable[str]) -> RowKind | None:
    """Return the kind of row with these fields; None when no kind has them."""
    given = set(fields)
    for kind in (CHAT, COMPLETION, INSTRUCTION):
        if not given.isdisjoint(kind.required):
            return kind
    return None


def row_examples(row: Any, location: SourceLocation) -> list[Example]:
    """Return a row's examples; `messages` may be JSON text. Raises InvalidRequest with location, field and reason."""
    if not isinstance(row, dict):
        raise location.error(f"{json_kind(row)}; expected an object with {KINDS}")
    kind = row_kind(name for name, value in row.items() if value is not None)
    given = {name: row[name] for name in (() if kind is None else kind.fields) if row.get(name) is not None}
    unknown = unknown_fields(row, () if kind is None else kind.fields)
    _check_fields(kind, given, unknown, row, location)
    if kind is CHAT:
        return chat_examples(given["messages"], location)
    if kind is COMPLETION:
        prompt = _filled(given, "prompt", location)
        return [Example(location, prompt, _answer(given, "completion", location))]
    instruction = _filled(given, "instruction", location)
    context = require_text(given.get("input", ""), "input", location)
    return [Example(location, Instruction(instruction, context), _answer(given, "output", location))]


def _check_fields(
    kind: RowKind | None,
    given: Mapping[str, Any],
    unknown: Sequence[str],
    row: Mapping[str, Any],
    location: SourceLocation,
) -> None:
    foreign = advice(row)
    if kind is None:
        found = names(row) or "no field"
        raise location.error(f"field messages is missing: found {found}. {foreign or f'Expected {KINDS}'}")
    missing = [name for name in kind.required if name not in given]
    if missing:
        raise location.error(f"field {missing[0]} is missing or null. {foreign or f'Expected {kind.text}'}")
    if foreign is not None and (unknown or not isinstance(given[kind.required[0]], str)):
        raise location.error(f"field {(unknown or kind.required)[0]}: {foreign}")
    if unknown:
        wrong = f"field {unknown[0]} is unknown: remove it" if len(unknown) == 1 else ""
        wrong = wrong or f"fields {names(unknown)} are unknown: remove them"
        raise location.error(f"{wrong}; expected {kind.text}")


def _filled(given: Mapping[str, Any], field: str, location: SourceLocation) -> str:
    text = require_text(given[field], field, location)
    if not text:
        raise location.error(f"field {field}: empty; expected text")
    return text


def _answer(given: Mapping[str, Any], field: str, location: SourceLocation) -> str:
    text = require_text(given[field], field, location)
    if not text or text.isspace():
        raise location.error(f"field {field}: empty answer: there is nothing to learn")
    return text
