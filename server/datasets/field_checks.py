"""Checks of single values in a row, and how messages name them. A message never repeats a value of the file."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from reftserve.server.datasets.source_location import SourceLocation

NAMES = 20
NAME_CHARACTERS = 40

_KINDS = {str: "text", bool: "true or false", int: "number", float: "number", list: "list", dict: "object"}


def json_kind(value: Any) -> str:
    """Return a JSON value's kind in words."""
    return _KINDS.get(type(value), "null")


def require_text(value: Any, field: str, location: SourceLocation) -> str:
    """Return a text. Raises InvalidRequest for other values, and for half a surrogate pair, which has no UTF-8."""
    if not isinstance(value, str):
        raise location.error(f"field {field}: {json_kind(value)}; expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as cause:
            raise location.error(
                f"field {field}: half a surrogate pair at character {cause.start} is no character; "
                "write the whole pair, or the character itself"
            ) from cause
    return value


def unknown_fields(fields: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return the fields that are not known and have a value; null, `[]` and `{}` are none."""
    return [shown(name) for name, value in fields.items() if name not in known and not is_not_given(value)]


def is_not_given(value: Any) -> bool:
    """Return whether a value of an unknown field says nothing."""
    return value is None or (isinstance(value, (list, dict)) and not value)


def names(fields: Iterable[str]) -> str:
    """Return the first names, in quotes and cut."""
    chosen = [repr(shown(name)) for name in itertools.islice(fields, NAMES + 1)]
    return ", ".join(chosen[:NAMES]) + (", ..." if len(chosen) > NAMES else "")


def shown(name: str) -> str:
    """Return a name in printable characters, cut."""
    cut = name[:NAME_CHARACTERS].encode("unicode_escape").decode() if not name.isprintable() else name
    return cut if len(cut) <= NAME_CHARACTERS else f"{cut[:NAME_CHARACTERS]}..."
