"""/v1/files."""

from __future__ import annotations

from typing import Literal

from reftserve.client.schemas.base import Response


class FileObject(Response):
    """An uploaded or produced file. examples: of a validated data set, one for each answer to learn."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"
    examples: int | None = None
