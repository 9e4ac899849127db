# Generated from client/_async/models.py by `make generate`. Change that file instead.
"""Models: the names that `model` accepts."""

from __future__ import annotations

from reftserve.client._sync.connection import Connection
from reftserve.client.calls import models as calls
from reftserve.client.schemas import Model


class Models:
    """`client.models`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._base: str | None = None

    def list(self) -> list[Model]:
        """Return the base first, then every intervention."""
        return self._connection.send_pages(calls.list_models)

    def base(self) -> str:
        """Return the base model's id. Only the first use asks the server."""
        if self._base is None:
            self._base = (self.list())[0].id
        return self._base
