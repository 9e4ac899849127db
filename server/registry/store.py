"""Everything durable, opened together: server and worker call this with the same settings and see the same things."""

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
    """Database, blobs, files and interventions of one data folder."""

    database: Database
    blobs: BlobStore
    files: FileStore
    interventions: InterventionRegistry

    def sweep(self) -> list[str]:
        """Remove files and artifacts that a crash left without a row; for start-up. Returns their keys.

        Blobs older than the database's first row are another database's, which may be restored yet: they stay. An empty
        database sweeps nothing and logs how many blobs it does not know.
        """
        since = self._first_row()
        if since is not None:
            return [*self.interventions.sweep(since=since), *self.files.sweep(since=since)]
        unknown = sum(len(self.blobs.children(kind)) for kind in (FILES, INTERVENTIONS))
        if unknown:
            logger.warning(
                "the database %s is empty, but %s holds %d files and artifacts that it does not know; none is removed. "
                "Restore the database that knows them, or remove that folder if they are not needed",
                self.database.url.render_as_string(),
                self.blobs.root,
                unknown,
            )
        return []

    def _first_row(self) -> int | None:
        """Find when the oldest file, intervention, job or eval was made (Unix seconds); None when there is none."""
        with self.database.reading() as session:
            oldest = [session.scalar(select(func.min(table.created_at))) for table in (File, Intervention, Job, Eval)]
        return min((moment for moment in oldest if moment is not None), default=None)


def open_store(settings: Settings, base: BaseFingerprint) -> Store:
    """Open, and migrate to the newest schema."""
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
