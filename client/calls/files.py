"""Calls for files, and the ways a caller can name a data set."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TypeGuard

from reftserve.client.calls.call import Call, Upload, given, one
from reftserve.client.schemas import Deleted, FileObject, Page

DataFile = str | Path | FileObject
DATA_SET = "fine-tune"
_FILE_ID = re.compile("file-[0-9a-f]+")


def is_file_id(file: str | Path) -> TypeGuard[str]:
    """Return whether `file` is the id of an uploaded file, not a path. An existing local file wins."""
    return isinstance(file, str) and _FILE_ID.fullmatch(file) is not None and not Path(file).is_file()


def sha256(file: str | Path) -> str:
    """Return the hash of a file's bytes, as the server writes it. Raises OSError."""
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def upload_name(file: str | Path) -> str:
    """Return a file's name for a multipart body: bytes of the name that are no UTF-8 become U+FFFD."""
    return os.fsencode(Path(file).name).decode("utf-8", "replace")


def upload_file(file: str | Path | bytes, purpose: str, filename: str | None) -> Call[FileObject]:
    """POST /v1/files. file: a path, or the content."""
    content = file if isinstance(file, bytes) else Path(file)
    default_name = upload_name(content) if isinstance(content, Path) else "upload.jsonl"
    upload = Upload(filename or default_name, content)
    return Call("POST", "/v1/files", one(FileObject), form={"purpose": purpose}, upload=upload)


def list_files(purpose: str | None, after: str | None) -> Call[Page[FileObject]]:
    """GET /v1/files: the page behind the file `after`."""
    return Call("GET", "/v1/files", one(Page[FileObject]), params=given({"purpose": purpose, "after": after}))


def get_file(file_id: str) -> Call[FileObject]:
    """GET /v1/files/{id}."""
    return Call("GET", f"/v1/files/{file_id}", one(FileObject))


def file_content(file_id: str) -> Call[bytes]:
    """GET /v1/files/{id}/content."""
    return Call("GET", f"/v1/files/{file_id}/content", lambda response: response.content)


def delete_file(file_id: str) -> Call[Deleted]:
    """DELETE /v1/files/{id}."""
    return Call("DELETE", f"/v1/files/{file_id}", one(Deleted))
