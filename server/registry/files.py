"""Files: uploaded data sets and results of jobs. Bytes are blobs, everything else is a row."""

from __future__ import annotations

import hashlib
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import select

from reftserve.server.errors import InvalidRequest, NotFound, PayloadTooLarge
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import File

TRAINING, RESULTS = "fine-tune", "fine-tune-results"
CHUNK_BYTES = 1 << 20


class FileStore:
    """Files by id.

    validate: counts the examples of a training file at a path, that came under a name, or raises InvalidRequest.
    """

    def __init__(
        self, database: Database, blobs: BlobStore, *, max_bytes: int, validate: Callable[[Path, str], int]
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._validate = validate

    def upload(self, owner: str, filename: str, purpose: str, stream: BinaryIO) -> File:
        """Take a user's file; it exists only if it is valid.

        Raises InvalidRequest, PayloadTooLarge or StorageFull.
        """
        if purpose != TRAINING:
            raise InvalidRequest(
                f"purpose is {purpose!r}; files can be uploaded for {TRAINING!r}",
                param="purpose",
                code="invalid_purpose",
            )
        with tempfile.TemporaryDirectory() as scratch:
            received = Path(scratch) / "upload"
            self._receive(stream, received)
            examples = self._validate(received, filename)
            file_id = f"file-{uuid.uuid4().hex}"
            return self._store(owner, filename, purpose, received, examples, file_id=file_id)

    def put_result(self, owner: str, job_id: str, filename: str, content: bytes) -> File:
        """Keep what a job produced; again, after a crash, it replaces the same file."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "result"
            file.write_bytes(content)
            file_id = f"file-{job_id.removeprefix('ftjob-')}"
            return self._store(owner, filename, RESULTS, file, None, file_id=file_id)

    def get(self, owner: str, file_id: str, *, param: str = "file_id") -> File:
        """A file's row.

        Raises NotFound.
        """
        with self._database.reading() as session:
            file = session.get(File, file_id)
        if file is None or file.owner != owner:
            raise NotFound(f"no file {file_id!r}", param=param, code="file_not_found")
        return file

    def list_all(self, owner: str, *, purpose: str | None = None) -> list[File]:
        """An owner's files, newest first."""
        query = select(File).where(File.owner == owner).order_by(File.created_at.desc(), File.id)
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def path(self, file: File) -> Path:
        """A file's bytes as a local path."""
        return self._blobs.local_file(file.blob_key)

    def delete(self, owner: str, file_id: str) -> None:
        """Remove a file; jobs that have read it keep what they need.

        Raises NotFound.
        """
        file = self.get(owner, file_id)
        with self._database.session() as session:
            session.delete(session.get_one(File, file_id))
        self._blobs.delete(file.blob_key)

    def _receive(self, stream: BinaryIO, target: Path) -> None:
        received = 0
        with target.open("wb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                received += len(chunk)
                if received > self._max_bytes:
                    raise PayloadTooLarge(
                        f"the file has more than {self._max_bytes} bytes, which is the limit", param="file"
                    )
                file.write(chunk)

    def _store(
        self, owner: str, filename: str, purpose: str, content: Path, examples: int | None, *, file_id: str
    ) -> File:
        file = File(
            id=file_id,
            owner=owner,
            filename=filename,
            purpose=purpose,
            bytes=content.stat().st_size,
            sha256=_sha256(content),
            blob_key=f"files/{file_id}",
            examples=examples,
            created_at=int(time.time()),
        )
        self._blobs.put_file(file.blob_key, content)
        try:
            with self._database.session() as session:
                session.merge(file)
        except BaseException:
            self._blobs.delete(file.blob_key)
            raise
        return file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
