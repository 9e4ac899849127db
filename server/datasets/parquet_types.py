"""Types of Parquet columns: which of Arrow's become a row's fields. Others are refused by name before a row is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftserve.server.datasets.conversations import MESSAGE_FIELDS
from reftserve.server.datasets.source_location import file_error

if TYPE_CHECKING:
    import pyarrow as pa

TYPE_CHARACTERS = 100
MESSAGES = "list<struct<role: string, content: string>>, or string with JSON"


def check_type(name: str, found: pa.DataType) -> None:
    """Check the type of a known column. Raises InvalidRequest with its name and type.

    Fields of a message that we do not know may have any plain type: rows refuse those that are not null.
    """
    import pyarrow as pa

    if _is_text(found) or pa.types.is_null(found):
        return
    expected = "string"
    if name == "messages":
        expected = MESSAGES
        if _is_list(found) and pa.types.is_struct(found.value_type):
            for field in found.value_type:
                _check_message_field(field.name, field.type)
            return
    raise _error(name, found, expected)


def _check_message_field(name: str, found: pa.DataType) -> None:
    import pyarrow as pa

    if pa.types.is_null(found) or _is_text(found):
        return
    if name == "weight" and (pa.types.is_integer(found) or pa.types.is_floating(found)):
        return
    if name == "content" and _is_list(found) and pa.types.is_struct(found.value_type):
        for field in found.value_type:
            if field.name in ("type", "text") and not (_is_text(field.type) or pa.types.is_null(field.type)):
                raise _error(f"messages.content.{field.name}", field.type, "string")
            _check_unknown(f"messages.content.{field.name}", field.type)
        return
    if name in MESSAGE_FIELDS:
        raise _error(f"messages.{name}", found, "integer" if name == "weight" else "string")
    _check_unknown(f"messages.{name}", found)


def _check_unknown(name: str, found: pa.DataType) -> None:
    """Refuse types whose values may have no Python value, such as times of nanoseconds, or hide nested items (maps)."""
    import pyarrow as pa

    is_plain = pa.types.is_boolean(found) or pa.types.is_integer(found) or pa.types.is_floating(found)
    if is_plain or pa.types.is_null(found) or _is_text(found):
        return
    if not (_is_list(found) or pa.types.is_struct(found)):
        raise _error(name, found, "no such field")
    for index in range(found.num_fields):
        _check_unknown(name, found.field(index).type)


def _is_text(found: pa.DataType) -> bool:
    import pyarrow as pa

    found = found.value_type if pa.types.is_dictionary(found) else found
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found))


def _is_list(found: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(found) or pa.types.is_large_list(found))


def _error(name: str, found: pa.DataType, expected: str) -> Exception:
    import pyarrow as pa

    kind = str(found.value_type if pa.types.is_dictionary(found) else found)
    kind = kind if len(kind) <= TYPE_CHARACTERS else f"{kind[:TYPE_CHARACTERS]}..."
    return file_error(f"column {name!r} has type {kind}; expected {expected}")
