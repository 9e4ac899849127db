"""Where in a file something stands, and the errors that say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reftserve.server.errors import InvalidRequest


@dataclass(frozen=True)
class SourceLocation:
    """A row: `line 3` of JSON Lines, `row 3` of anything else. number: from 1, which in CSV is the header."""

    unit: Literal["line", "row"]
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"

    def error(self, message: str) -> InvalidRequest:
        """What is wrong here."""
        return InvalidRequest(f"{self}: {message}", param=f"file.{self.unit}.{self.number}", code="invalid_data")


def file_error(message: str) -> InvalidRequest:
    """What is wrong with a whole file."""
    return InvalidRequest(message, param="file", code="invalid_data")
