"""Locations of rows in a data file, and the errors that name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reftserve.server.errors import InvalidRequest


@dataclass(frozen=True)
class SourceLocation:
    """A row: `line 3` of JSON Lines, `row 3` of other formats. number: from 1; a CSV's header is row 1."""

    unit: Literal["line", "row"]
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"

    def error(self, message: str) -> InvalidRequest:
        """Return an error that names this location."""
        return InvalidRequest(f"{self}: {message}", param=f"file.{self.unit}.{self.number}", code="invalid_data")


def file_error(message: str) -> InvalidRequest:
    """Return an error about a whole file."""
    return InvalidRequest(message, param="file", code="invalid_data")
