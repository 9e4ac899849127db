"""/v1/files: uploaded data sets and job results."""

from __future__ import annotations

from typing import Literal

from reftserve.client.schemas.base import Response


class FileObject(Response):
    """An uploaded file or a job's result. examples: number of answers to learn in a data set. sha256: of its bytes."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"
    examples: int | None = None
    sha256: str | None = None
