"""Models: the names that `model` accepts."""

from __future__ import annotations

from reftserve.client._async.connection import AsyncConnection
from reftserve.client.calls import models as calls
from reftserve.client.schemas import Model


class AsyncModels:
    """`client.models`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._base: str | None = None

    async def list(self) -> list[Model]:
        """Return the base first, then every intervention."""
        return await self._connection.send_pages(calls.list_models)

    async def base(self) -> str:
        """Return the base model's id. Only the first use asks the server."""
        if self._base is None:
            self._base = (await self.list())[0].id
        return self._base
