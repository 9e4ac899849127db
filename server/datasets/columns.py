"""Columns of a table: its names are judged before a row is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from reftserve.server.datasets.field_checks import names as in_words
from reftserve.server.datasets.field_checks import shown
from reftserve.server.datasets.foreign_rows import advice
from reftserve.server.datasets.limits import MAX_COLUMNS
from reftserve.server.datasets.rows import FIELDS, KINDS, row_kind
from reftserve.server.datasets.source_location import file_error

_PANDAS_INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


def check_columns(names: Sequence[str]) -> None:
    """Check that a table has the columns of a kind of row; others may stand there empty. Raises InvalidRequest."""
    if len(names) > MAX_COLUMNS:
        raise file_error(f"the table has {len(names)} columns; at most {MAX_COLUMNS} are read, expected {KINDS}")
    kind = row_kind(names)
    if kind is None:
        raise file_error(f"the columns are {in_words(names)}. {advice(names) or _expected(names)}")
    missing = [name for name in kind.required if name not in names]
    if missing:
        raise file_error(
            f"column {missing[0]!r} is missing; the columns are {in_words(names)}. {advice(names) or _expected(names)}"
        )
    if repeated := [name for name, count in Counter(names).items() if count > 1 and name in FIELDS]:
        raise file_error(f"column {repeated[0]!r} occurs twice; remove one of them")


def unknown_columns(names: Sequence[str]) -> str:
    """Return the message about columns that no kind of row has, although they are not empty."""
    unknown = [name for name in names if name not in FIELDS]
    if len(unknown) == 1 and _PANDAS_INDEX.fullmatch(unknown[0]):
        return (
            f"column {unknown[0]!r} is unknown: it looks like pandas' index; write the file with "
            "`to_csv(..., index=False)` or `to_parquet(..., index=False)`"
        )
    verb = "is unknown: remove it" if len(unknown) == 1 else "are unknown: remove them"
    word = "column" if len(unknown) == 1 else "columns"
    return f"{word} {in_words(unknown)} {verb}. {advice(names) or f'Expected {KINDS}'}"


def _expected(names: Sequence[str]) -> str:
    spelt = {name.strip().lower(): name for name in names if name.strip().lower() in FIELDS and name not in FIELDS}
    if spelt:
        meant, found = next(iter(spelt.items()))
        return f"Rename {shown(found)!r} to {meant!r}; expected {KINDS}"
    return f"Expected {KINDS}, separated by commas, semicolons or tabs in CSV"
