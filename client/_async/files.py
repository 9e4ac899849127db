"""Files: data sets and results."""

from __future__ import annotations

from pathlib import Path

from reftserve.client._async.connection import AsyncConnection
from reftserve.client.calls import files as calls
from reftserve.client.calls.files import DataFile
from reftserve.client.schemas import Deleted, FileObject


class AsyncFiles:
    """`client.files`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def upload(
        self, file: str | Path | bytes, *, purpose: str = calls.DATA_SET, filename: str | None = None
    ) -> FileObject:
        """Upload a path or bytes. The server validates each row of a data set."""
        return await self._connection.send(calls.upload_file(file, purpose, filename))

    async def list(self, *, purpose: str | None = None) -> list[FileObject]:
        """Return all files, newest first."""
        return await self._connection.send_pages(lambda after: calls.list_files(purpose, after))

    async def get(self, file_id: str) -> FileObject:
        """Return one file's description."""
        return await self._connection.send(calls.get_file(file_id))

    async def content(self, file_id: str) -> bytes:
        """Return a file's bytes."""
        return await self._connection.send(calls.file_content(file_id))

    async def delete(self, file_id: str) -> Deleted:
        """Delete a file."""
        return await self._connection.send(calls.delete_file(file_id))

    async def id_of(self, file: DataFile) -> str:
        """Return the id of a data set. A path is uploaded, unless the server has that content under that name."""
        if isinstance(file, FileObject):
            return file.id
        if calls.is_file_id(file):
            return file
        digest = calls.sha256(file)
        kept = await self.list(purpose=calls.DATA_SET)
        same = (one.id for one in kept if (one.sha256, one.filename) == (digest, calls.upload_name(file)))
        return next(same, None) or (await self.upload(file)).id
