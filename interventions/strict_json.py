"""Checks a JSON document from outside before it is used: its size, number of values, depth, keys and numbers."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from pydantic import ValidationError

from reftserve.interventions.intervention_errors import ManifestError, shorten

MAX_VALUES = 1 << 17  # about 15 MB as Python's objects
MAX_DIGITS = 18  # of an integer; it fits 64 bits


def check_json(content: bytes, file: str, *, max_bytes: int) -> None:
    """Raise ManifestError unless it is one JSON object in UTF-8, within bounds, with unique keys and finite numbers.

    file: its name, for messages.
    """
    if len(content) > max_bytes:
        raise ManifestError(f"{file} has {len(content)} bytes; at most {max_bytes} are read")
    values = sum(content.count(mark) for mark in b",:[{")
    if values > MAX_VALUES:
        raise ManifestError(f"{file} holds about {values} values; at most {MAX_VALUES} are read")
    if b"\\u0000" in content:
        raise ManifestError(f"{file} holds a NUL character (\\u0000), which no text may hold")
    try:
        found = json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError as cause:
        raise ManifestError(f"{file} is nested too deeply") from cause
    except ValueError as cause:  # includes errors of JSON and UTF-8
        raise ManifestError(f"{file} is not JSON that is read here: {shorten(str(cause))}") from cause
    if not isinstance(found, dict):
        raise ManifestError(f"{file} holds {shorten(repr(found))}; expected one object")


def invalid_document(file: str, cause: ValidationError) -> ManifestError:
    """Return the error for a document whose fields are wrong: the first one's path and what would be right."""
    first = cause.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "document"
    return ManifestError(f"{file}: {shorten(where)}: {shorten(first['msg'])}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(repr(twice))} is given twice")
    return found


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the number {shorten(text)} is too large")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shorten(text)} is too large")
    return number


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")
