"""JSON bodies: from bytes to a value whose parts are few, before any of them is made.

A parser makes objects as fast as an attacker sends them, 1.4 million from 4 MiB, and holds the interpreter's lock
meanwhile. So the parts are counted in the bytes first, outside of strings, which costs a few milliseconds.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from reftserve.server.errors import InvalidRequest

MAX_CONTAINERS = 1 << 14  # objects and lists
MAX_STRINGS = 1 << 16  # names of fields included
MAX_VALUES = 1 << 18  # token ids, for the most part
MAX_DEPTH = 64


def parse_body(body: bytes) -> Any:
    """Return the value. Raises InvalidRequest with the place for what is not JSON, too large, or a name given twice."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise _invalid(f"the body is not UTF-8: byte {cause.start} is 0x{body[cause.start]:02x}") from cause
    _check_size(body)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_number)
    except json.JSONDecodeError as cause:
        place = len(text[: cause.pos].encode())
        raise _invalid(f"the body is not JSON: {cause.msg} at byte {place}") from cause
    except ValueError as cause:  # Python reads no integer above 4,300 digits
        raise _invalid("the body holds a number of more than 4,300 digits") from cause


def _check_size(body: bytes) -> None:
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    strings = unescaped.count(b'"') // 2
    if strings > MAX_STRINGS:
        raise _invalid(f"the body holds {strings} strings; at most {MAX_STRINGS} are allowed")
    outside = b"".join(unescaped.split(b'"')[::2])
    containers = outside.count(b"{") + outside.count(b"[")
    if containers > MAX_CONTAINERS:
        raise _invalid(f"the body holds {containers} objects and lists; at most {MAX_CONTAINERS} are allowed")
    values = outside.count(b",") + containers
    if values > MAX_VALUES:
        raise _invalid(f"the body holds {values} values; at most {MAX_VALUES} are allowed")
    depth = 0
    for bracket in outside.translate(None, delete=_OTHERS):
        depth += 1 if bracket in b"{[" else -1
        if depth > MAX_DEPTH:
            raise _invalid(f"the body is nested more than {MAX_DEPTH} deep")
        if depth < 0:
            raise _invalid("the body is not JSON: it closes more objects and lists than it opens")


_OTHERS = bytes(byte for byte in range(256) if byte not in b"{}[]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"field {twice!r} is given twice", param=twice, code="duplicate_field")
    return found


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _invalid(f"the number {digits[:50]} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"the body is not JSON: {name} is no JSON number")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_json")
