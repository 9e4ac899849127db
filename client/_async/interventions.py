"""Published interventions, their versions and aliases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reftserve.client._async.connection import AsyncConnection
from reftserve.client.calls import interventions as calls
from reftserve.client.schemas import Deleted, InterventionHistory, InterventionInfo, InterventionVersion


class AsyncInterventions:
    """`client.interventions`. A version is a number or an alias."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self) -> list[InterventionInfo]:
        """Return all interventions, sorted by name."""
        return await self._connection.send_pages(calls.list_interventions)

    async def versions(self, name: str) -> Sequence[InterventionVersion]:
        """Return all versions of an intervention with their manifests, newest first."""
        return await self._connection.send_pages(lambda after: calls.list_versions(name, after))

    async def get(self, name: str) -> InterventionInfo:
        """Return an intervention's versions and aliases."""
        return await self._connection.send(calls.get_intervention(name))

    async def version(self, name: str, version: int | str = "latest") -> InterventionVersion:
        """Return a version with its manifest."""
        return await self._connection.send(calls.get_version(name, version))

    async def history(self, name: str, version: int | str = "latest") -> InterventionHistory:
        """Return a version's history: a column per figure, a row per step. Raises NotFound if it has none."""
        return await self._connection.send(calls.get_history(name, version))

    async def upload(self, name: str, artifact: str | Path) -> InterventionVersion:
        """Publish an artifact, a folder or a zip of one, as the next version of `name`."""
        return await self._connection.send(calls.upload_intervention(name, artifact))

    async def download(self, name: str, folder: str | Path, *, version: int | str = "latest") -> Path:
        """Write a version's manifest.json, edits.safetensors and, if it has one, history.json into `folder`."""
        return await self._connection.send(calls.download_intervention(name, version, folder))

    async def delete(self, name: str, version: int | str | None = None, *, force: bool = False) -> Deleted:
        """Delete one version, or all. Raises Conflict while running requests use it, unless `force`; they finish."""
        return await self._connection.send(calls.delete_intervention(name, version, force=force))

    async def alias(self, name: str, alias: str, version: int) -> InterventionInfo:
        """Point an alias at a version."""
        return await self._connection.send(calls.set_alias(name, alias, version))

    async def delete_alias(self, name: str, alias: str) -> InterventionInfo:
        """Remove an alias."""
        return await self._connection.send(calls.delete_alias(name, alias))
