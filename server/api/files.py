"""/v1/files in OpenAI's shape. An upload is stored only if it is a valid data set."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends, Form, Query, UploadFile
from fastapi import File as FormFile
from fastapi.responses import FileResponse

from reftserve.client.schemas import Deleted, FileObject, Page
from reftserve.server.api.dependencies import Files, Owner
from reftserve.server.api.envelope import page
from reftserve.server.api.forms import only_fields
from reftserve.server.api.own_threads import OwnThreads
from reftserve.server.storage.tables import File

router = APIRouter(prefix="/v1/files", tags=["files"])
_uploads = OwnThreads("uploads", threads=4)


@router.post("", dependencies=[Depends(only_fields("purpose", "file"))])
async def upload_file(files: Files, owner: Owner, purpose: str = Form(), file: UploadFile = FormFile()) -> FileObject:
    """Upload a data set, in JSON Lines, a JSON array, CSV or Parquet.

    Rows have chat `messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`.
    """
    return _file(await _uploads.run(lambda: files.upload(owner, file.filename or "upload", purpose, file.file)))


@router.get("")
def list_files(
    files: Files,
    owner: Owner,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = Query(10_000, ge=1, le=10_000),
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """List files by time of creation."""
    rows, more = files.list_page(owner, purpose=purpose, after=after, limit=limit, descending=order == "desc")
    return page([_file(row) for row in rows], [row.id for row in rows], has_more=more)


@router.get("/{file_id}")
def get_file(file_id: str, files: Files, owner: Owner) -> FileObject:
    """Return a file's description."""
    return _file(files.get(owner, file_id))


@router.get("/{file_id}/content", response_class=FileResponse)
def get_content(file_id: str, files: Files, owner: Owner) -> FileResponse:
    """Return a file's bytes."""
    row = files.get(owner, file_id)
    return FileResponse(files.path(row), filename=row.filename, media_type="application/octet-stream")


@router.delete("/{file_id}")
def delete_file(file_id: str, files: Files, owner: Owner) -> Deleted:
    """Delete a file."""
    files.delete(owner, file_id)
    return Deleted(id=file_id, object="file")


def _file(row: File) -> FileObject:
    return FileObject(
        id=row.id,
        bytes=row.bytes,
        created_at=row.created_at,
        filename=row.filename,
        purpose=row.purpose,
        examples=row.examples,
        sha256=row.sha256,
    )
