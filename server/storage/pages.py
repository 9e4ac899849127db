"""Pages of lists: one query each, along an index. A page begins after the row that ended the page before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, exists, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

Key = Sequence[InstrumentedAttribute[Any]]


def read_page(
    session: Session, query: Select[Any], key: Key, *, after: Sequence[Any] | None, limit: int, ascending: bool
) -> tuple[list[Any], bool]:
    """Return up to `limit` rows in the order of `key`, and whether more follow.

    key: columns that order the rows without ties. after: their values in the row before the page.
    """
    if after is not None:
        here = tuple_(*key)
        query = query.where(here > tuple(after) if ascending else here < tuple(after))
    query = query.order_by(*(column.asc() if ascending else column.desc() for column in key))
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def has_metadata(
    session: Session, column: InstrumentedAttribute[Any], wanted: Mapping[str, str]
) -> list[ColumnElement[bool]]:
    """Return conditions that a JSON column of strings by name holds the wanted ones."""
    if session.get_bind().dialect.name != "sqlite":
        return [column[name].as_string() == value for name, value in wanted.items()]
    # SQLite's paths cannot name a key that holds a quotation mark.
    conditions: list[ColumnElement[bool]] = []
    for name, value in wanted.items():
        entry = func.json_each(column).table_valued("key", "value")
        conditions.append(exists(select(1).select_from(entry).where(entry.c.key == name, entry.c.value == value)))
    return conditions
