"""/v1/files in OpenAI's shape. An upload is stored only if it is a valid data set."""

from __future__ import annotations

from fastapi import APIRouter, Form, UploadFile
from fastapi import File as FormFile
from fastapi.responses import FileResponse

from reftserve.client.schemas import Deleted, FileObject, Page
from reftserve.server.api.dependencies import Files, Owner
from reftserve.server.storage.tables import File

router = APIRouter(prefix="/v1/files", tags=["files"])


@router.post("")
def upload_file(files: Files, owner: Owner, purpose: str = Form(), file: UploadFile = FormFile()) -> FileObject:
    """Upload a data set, in JSON Lines, a JSON array, CSV or Parquet.

    Rows have chat `messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`.
    """
    return _file(files.upload(owner, file.filename or "upload", purpose, file.file))


@router.get("")
def list_files(files: Files, owner: Owner, purpose: str | None = None) -> Page[FileObject]:
    """List all files, newest first."""
    return Page(data=[_file(row) for row in files.list_all(owner, purpose=purpose)])


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
