"""The durable store: database, blobs, files and interventions. Server and workers open it from the same settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqlalchemy import func, select

from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.datasets.file_store import BLOBS as FILES
from reftserve.server.datasets.file_store import FileStore
from reftserve.server.registry.intervention_registry import BLOBS as INTERVENTIONS
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.settings import Settings
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Eval, File, Intervention, Job

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """The open database, blobs, files and interventions."""

    database: Database
    blobs: BlobStore
    files: FileStore
    interventions: InterventionRegistry

    def sweep(self) -> list[str]:
        """Delete files and artifacts that a crash left without a row, at start-up; return their keys.

        Blobs older than the database's first row stay: another database may list them. An empty database deletes none.
        """
        since = self._first_row()
        if since is not None:
            return [*self.interventions.sweep(since=since), *self.files.sweep(since=since)]
        unknown = sum(len(self.blobs.children(kind)) for kind in (FILES, INTERVENTIONS))
        if unknown:
            logger.warning(
                "the database %s is empty, but %s holds %d files and artifacts that it does not list; none is removed. "
                "Restore the database that lists them, or remove that folder if you do not need them",
                self.database.url.render_as_string(),
                self.blobs.root,
                unknown,
            )
        return []

    def _first_row(self) -> int | None:
        with self.database.reading() as session:
            oldest = [session.scalar(select(func.min(table.created_at))) for table in (File, Intervention, Job, Eval)]
        return min((moment for moment in oldest if moment is not None), default=None)


def open_store(settings: Settings, base: BaseFingerprint) -> Store:
    """Open the store and migrate the database to the newest schema."""
    settings.data.mkdir(parents=True, exist_ok=True)
    database = Database(settings.resolved_database_url)
    database.migrate()
    blobs = BlobStore(settings.resolved_blob_url, cache=settings.data / "cache")
    return Store(
        database=database,
        blobs=blobs,
        files=FileStore(
            database,
            blobs,
            max_bytes=settings.max_file_bytes,
            max_owner_bytes=settings.max_owner_bytes,
        ),
        interventions=InterventionRegistry(
            database,
            blobs,
            base,
            override_fingerprint=settings.override_fingerprint,
            max_artifact_bytes=settings.max_artifact_bytes,
            max_owner_bytes=settings.max_owner_interventions_bytes,
        ),
    )
