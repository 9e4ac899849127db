"""The training curve of an intervention, `history.json`. The engine ignores it and the content hash leaves it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from reftserve.interventions.strict_json import check_json, invalid_document

T = TypeVar("T")
HISTORY_FILE = "history.json"
MAX_POINTS = 1000
MAX_SCORES = 32
HELD_OUT = "valid_"

MAX_HISTORY_BYTES = 8 << 20

Column = Annotated[list[float | None], Field(max_length=MAX_POINTS)]
Name = Annotated[str, StringConstraints(max_length=256)]


class History(BaseModel):
    """Columns of equal length, up to MAX_POINTS; None is unknown or not finite. valid: scores of the held-out part."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: list[int] = Field(max_length=MAX_POINTS)
    train_loss: Column
    learning_rate: Column
    tokens_per_second: Column = Field(default_factory=list)
    valid: dict[Name, Column] = Field(default_factory=dict, max_length=MAX_SCORES)

    @model_validator(mode="after")
    def _is_a_table(self) -> History:
        columns = {"train_loss": self.train_loss, "learning_rate": self.learning_rate, **self.valid}
        if self.tokens_per_second:
            columns["tokens_per_second"] = self.tokens_per_second
        for name, column in columns.items():
            if len(column) != len(self.step):
                raise ValueError(f"{name} has {len(column)} values, step has {len(self.step)}")
        return self

    @classmethod
    def of_steps(cls, steps: Sequence[Mapping[str, Any]]) -> History:
        """Return the history of rows. Above MAX_POINTS they are thinned evenly; half are reserved for scored steps."""
        scored = [row for row in steps if any(name.startswith(HELD_OUT) for name in row)]
        if len(steps) > MAX_POINTS:
            kept = [*_evenly(steps, MAX_POINTS // 2), *_evenly(scored, MAX_POINTS // 2)]
            steps = sorted({row["step"]: row for row in kept}.values(), key=lambda row: row["step"])
        names = sorted({name for row in scored for name in row if name.startswith(HELD_OUT)})
        return cls(
            step=[row["step"] for row in steps],
            train_loss=_column(steps, "train_loss"),
            learning_rate=_column(steps, "learning_rate"),
            tokens_per_second=_column(steps, "tokens_per_second"),
            valid={name.removeprefix(HELD_OUT): _column(steps, name) for name in names},
        )

    @classmethod
    def parse(cls, content: bytes) -> History:
        """Parse the file's content. Raises ManifestError when it is not a history."""
        check_json(content, HISTORY_FILE, max_bytes=MAX_HISTORY_BYTES)
        try:
            return cls.model_validate_json(content)
        except ValidationError as cause:
            raise invalid_document(HISTORY_FILE, cause) from cause


def _column(steps: Sequence[Mapping[str, Any]], name: str) -> Column:
    """Return a column rounded to six digits, float32's precision, in a third of the bytes."""
    found = (row.get(name) for row in steps)
    return [None if value is None or not math.isfinite(value) else float(f"{value:.6g}") for value in found]


def _evenly(rows: Sequence[T], count: int) -> list[T]:
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]
