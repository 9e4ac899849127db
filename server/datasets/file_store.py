"""Files: uploaded data sets and job results. A blob holds a file's bytes, a row everything else."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from reftserve.client.schemas.unicode import half_pair
from reftserve.server.datasets.check import check_data_set
from reftserve.server.errors import InvalidRequest, NotFound, PayloadTooLarge, QuotaExceeded
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.pages import read_page
from reftserve.server.storage.reserve import scratch_folder
from reftserve.server.storage.tables import File

TRAINING, RESULTS = "fine-tune", "fine-tune-results"
BLOBS = "files"
CHUNK_BYTES = 1 << 20


class FileStore:
    """Files by id. max_bytes: of one upload; max_owner_bytes: of an owner's uploads, job results not counted."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        *,
        max_bytes: int,
        max_owner_bytes: int = 16 << 30,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._max_owner_bytes = max_owner_bytes

    def upload(self, owner: str, filename: str, purpose: str, stream: BinaryIO) -> File:
        """Check and store a user's file. Raises InvalidRequest, Overloaded or others of storage."""
        if "\0" in filename or half_pair(filename) is not None:
            raise InvalidRequest(
                f"the file's name is {filename!a}; expected text without NUL and half surrogate pairs", param="file"
            )
        if purpose != TRAINING:
            raise InvalidRequest(
                f"purpose is {purpose!r}; files can be uploaded for {TRAINING!r}",
                param="purpose",
                code="invalid_purpose",
            )
        with scratch_folder("the upload") as scratch:
            received = scratch / "upload"
            self._receive(stream, received)
            examples = check_data_set(received, filename)
            file_id = f"file-{uuid.uuid4().hex}"

            def within_quota(session: Session) -> None:
                self._require_quota(session, owner, received.stat().st_size)

            return self._store(owner, filename, purpose, received, examples, file_id, within_quota)

    def put_result(
        self,
        owner: str,
        job_id: str,
        filename: str,
        content: bytes,
        *,
        check: Callable[[Session], object] = lambda session: None,
    ) -> File:
        """Store or replace a job's result file. check: runs in the transaction; its exception rolls this back."""
        with scratch_folder(filename) as scratch:
            file = scratch / "result"
            file.write_bytes(content)
            file_id = f"file-{job_id.removeprefix('ftjob-')}"
            return self._store(owner, filename, RESULTS, file, None, file_id, check)

    def get(self, owner: str, file_id: str, *, param: str = "file_id") -> File:
        """Return a file's row. Raises NotFound."""
        with self._database.reading() as session:
            file = session.get(File, file_id)
        if file is None or file.owner != owner:
            raise _no_file(file_id, param)
        return file

    def list_page(
        self,
        owner: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        descending: bool = True,
    ) -> tuple[list[File], bool]:
        """Return files by time of creation, from the one behind the file `after`, and whether more follow.

        Raises NotFound for an unknown `after`.
        """
        query = select(File).where(File.owner == owner)
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        last = None if after is None else self.get(owner, after, param="after")
        place = None if last is None else (last.created_at, last.id)
        with self._database.reading() as session:
            return read_page(
                session, query, (File.created_at, File.id), after=place, limit=limit, ascending=not descending
            )

    def path(self, file: File, *, param: str = "file_id") -> Path:
        """Return a local path to a file's bytes, after checking their hash.

        Raises NotFound when the store has lost or damaged them.
        """
        path = self._local(file, param)
        found = _sha256(path)
        if found != file.sha256 and self._blobs.drop_copy(file.blob_key):
            path = self._local(file, param)
            found = _sha256(path)
        if found != file.sha256:
            raise NotFound(
                f"the bytes of file {file.id!r} ({file.filename}) in the store are damaged: they have SHA-256 {found}; "
                f"expected {file.sha256}. Upload the file again",
                param=param,
                code="file_content_damaged",
            )
        return path

    def delete(self, owner: str, file_id: str) -> None:
        """Delete a file. A job that has read it needs it again only if its encoded data are lost. Raises NotFound."""
        with self._database.session(may_use_reserve=True) as session:
            # Locked: of two deletions at once the second finds nothing.
            file = session.get(File, file_id, with_for_update=True)
            if file is None or file.owner != owner:
                raise _no_file(file_id, "file_id")
            session.delete(file)
        self._blobs.discard(file.blob_key)

    def sweep(self, *, since: float = 0.0) -> list[str]:
        """Move bytes newer than `since` (Unix seconds) that have no row to the trash; return their keys."""
        with self._database.reading() as session:
            known = set(session.scalars(select(File.blob_key)))
        return self._blobs.sweep(BLOBS, known, since=since)

    def _local(self, file: File, param: str) -> Path:
        try:
            return self._blobs.local_file(file.blob_key)
        except FileNotFoundError as cause:
            raise NotFound(
                f"the bytes of file {file.id!r} ({file.filename}) are no longer in the store; upload it again",
                param=param,
                code="file_content_missing",
            ) from cause

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

    def _require_quota(self, session: Session, owner: str, more: int) -> None:
        self._database.advisory_lock(session, f"files of {owner}")
        query = select(func.coalesce(func.sum(File.bytes), 0)).where(File.owner == owner, File.purpose == TRAINING)
        used = int(session.scalar(query) or 0)
        if used + more > self._max_owner_bytes:
            raise QuotaExceeded(
                f"the file has {more} bytes, and {used} of {self._max_owner_bytes} bytes are used; delete files first",
                param="file",
            )

    def _store(
        self,
        owner: str,
        filename: str,
        purpose: str,
        content: Path,
        examples: int | None,
        file_id: str,
        check: Callable[[Session], object],
    ) -> File:
        file = File(
            id=file_id,
            owner=owner,
            filename=filename,
            purpose=purpose,
            bytes=content.stat().st_size,
            sha256=_sha256(content),
            # A new key each time, so that a replacement does not touch the bytes of the present row.
            blob_key=f"{BLOBS}/{uuid.uuid4().hex}",
            examples=examples,
            created_at=int(time.time()),
        )
        self._blobs.put_file(file.blob_key, content)
        with self._blobs.delete_blob_on_error(file.blob_key), self._database.session() as session:
            check(session)
            replaced = session.get(File, file_id)
            replaced_key = None if replaced is None else replaced.blob_key
            session.merge(file)
        if replaced_key is not None:
            self._blobs.discard(replaced_key)
        return file


def _no_file(file_id: str, param: str) -> NotFound:
    return NotFound(f"no file {file_id!r}", param=param, code="file_not_found")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
