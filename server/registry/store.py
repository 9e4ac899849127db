"""The durable store: database, blobs, files and interventions. Server and workers open it from the same settings."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.datasets.file_store import FileStore
from reftserve.server.errors import ServerError
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.settings import Settings
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.store_identity import is_own_store, require_own_store
from reftserve.server.storage.tables import Eval, File, Intervention, Job

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """The open database, blobs, files and interventions. keep_trash_s: how long swept blobs can be taken back."""

    database: Database
    blobs: BlobStore
    files: FileStore
    interventions: InterventionRegistry
    keep_trash_s: float

    def sweep(self) -> list[str]:
        """Move files and artifacts that a crash left without a row to the trash, and empty old trash.

        Return the keys of what was moved. Blobs older than the database's first row stay, and without rows all do:
        they may come from a database that an older release used on the same store.
        """
        # Again, because `doctor --rebuild` may have given the store to another database since the start.
        if not is_own_store(self.database, self.blobs):
            return []
        expired = self.blobs.empty_trash(older_than_s=self.keep_trash_s)
        if expired:
            logger.info("deleted %s, which were in the trash for more than %.0f s", expired, self.keep_trash_s)
        since = self._first_row()
        return [] if since is None else [*self.interventions.sweep(since=since), *self.files.sweep(since=since)]

    def sweep_in_background(self) -> None:
        """Sweep in a thread: a store of many blobs must not delay the start."""
        threading.Thread(target=self._try_to_sweep, name="sweep", daemon=True).start()

    def _try_to_sweep(self) -> None:
        try:
            self.sweep()
        except (OSError, SQLAlchemyError, ServerError):
            logger.exception("the sweep of the store failed; the next start sweeps again")

    def _first_row(self) -> int | None:
        with self.database.reading() as session:
            oldest = [session.scalar(select(func.min(table.created_at))) for table in (File, Intervention, Job, Eval)]
        return min((moment for moment in oldest if moment is not None), default=None)


def open_store(settings: Settings, base: BaseFingerprint, *, any_identity: bool = False) -> Store:
    """Open the store and migrate the database to the newest schema.

    Raises Unavailable when the database cannot be read, Conflict when the blobs are another database's, unless
    `any_identity`.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    database = Database(settings.resolved_database_url, reserve_bytes=settings.reserve_bytes)
    database.migrate()
    blobs = BlobStore(
        settings.resolved_blob_url,
        cache=settings.data / "cache",
        cache_bytes=settings.blob_cache_bytes,
        reserve=database.reserve,
    )
    if not any_identity:
        require_own_store(database, blobs)
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
        keep_trash_s=settings.keep_trash_s,
    )
