"""Everything durable, opened together: server and worker call this with the same settings and see the same things."""

from __future__ import annotations

from dataclasses import dataclass

from reftserve.interventions import BaseFingerprint
from reftserve.server.datasets.file_store import FileStore
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.settings import Settings
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database


@dataclass(frozen=True)
class Store:
    """Database, blobs, files and interventions of one data folder."""

    database: Database
    blobs: BlobStore
    files: FileStore
    interventions: InterventionRegistry


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
