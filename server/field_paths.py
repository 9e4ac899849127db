"""Which field a pydantic error is about, as a dotted path that the sender would recognise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def field_path(location: Sequence[str | int], value: Any) -> str:
    """The dotted path within `value` that an error's `loc` means.

    pydantic also puts the tried members of unions (`str`, `list[int]`, ...) into `loc`; they are no part of the path.
    """
    path: list[str] = []
    for index, part in enumerate(location):
        if isinstance(value, Mapping):
            # A field that is missing is not in the value; it can only come last.
            if part not in value and index < len(location) - 1:
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(str(part))
    return ".".join(path)
