"""Compares the database with its store, and registers interventions whose rows are lost (`reftserve doctor`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from reftserve.interventions.artifact import Artifact, check_artifact, read_artifact
from reftserve.interventions.intervention_errors import InterventionError
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.datasets.file_store import BLOBS as FILES
from reftserve.server.errors import NotFound
from reftserve.server.registry.intervention_registry import BLOBS as INTERVENTIONS
from reftserve.server.registry.names import LATEST
from reftserve.server.registry.store import Store
from reftserve.server.registry.stored_artifact import REGISTRATION_FILE, Registration, hash_files, require_intact
from reftserve.server.storage.blobs import TRASH
from reftserve.server.storage.store_identity import claim_store, is_own_store
from reftserve.server.storage.tables import Alias, File, Intervention, Job, Version

JOBS = "jobs"
ROWS = 500  # of one query


@dataclass(frozen=True)
class Orphan:
    """An intact artifact that no row names."""

    key: str
    artifact: Artifact
    registration: Registration


def inspect_store(store: Store) -> Iterator[str]:
    """Yield a line for each fault: a foreign store, blobs without rows, rows without blobs, contents that differ."""
    if not is_own_store(store.database, store.blobs):
        yield f"foreign: {store.blobs.root} does not carry the id of {store.database}"
    for kind, known in ((FILES, File.blob_key), (INTERVENTIONS, Version.blob_key), (JOBS, Job.id)):
        for key in _unknown(store, kind, known):
            yield f"orphan: {key} is in the store, and no row names it"
    for rows in _chunks(store, select(Version, Intervention.name).join(Intervention), Version.id):
        for version, name in rows:
            yield from _faults_of_version(store, version, f"{name}@{version.version}")
    for rows in _chunks(store, select(File), File.id):
        for (file,) in rows:
            try:
                store.files.path(file)
            except NotFound as cause:
                yield f"{'missing' if cause.code == 'file_content_missing' else 'damaged'}: {cause.message}"


def trashed(store: Store) -> list[str]:
    """Return the keys of what is in the trash."""
    return [
        key
        for moment in store.blobs.children(TRASH)
        for kind in store.blobs.children(moment)
        for key in store.blobs.children(kind)
    ]


def rebuild(store: Store, base: BaseFingerprint, *, owner: str, override: bool) -> Iterator[str]:
    """Give the store to the database and register artifacts without rows; yield a line for each.

    Names and numbers come from `registration.json`, `latest` is the highest number; other aliases are lost. Without
    that file, as in older releases, the owner is `owner` and the name `recovered-<hash>`. An artifact for another base
    is left unless `override`.
    """
    claim_store(store.database, store.blobs)
    yield f"{store.blobs.root} now belongs to {store.database}; no server of another database may use it"
    found = []
    for key in _unknown(store, INTERVENTIONS, Version.blob_key):
        try:
            orphan = _read(store, key, owner)
            base.require(orphan.artifact.manifest.base, override=override)
        except (InterventionError, ValidationError, OSError) as cause:
            yield f"left {key}: {cause}"
        else:
            found.append(orphan)
    for orphan in sorted(found, key=lambda o: (o.registration.name, o.registration.version, o.registration.created_at)):
        with store.database.session() as session:
            yield _register(session, store, orphan)


def _faults_of_version(store: Store, version: Version, version_id: str) -> Iterator[str]:
    try:
        folder = store.blobs.local_folder(version.blob_key)
        require_intact(folder, version_id, version)
    except FileNotFoundError:
        yield f"missing: {version_id} has no artifact at {version.blob_key}"
    except NotFound as cause:
        yield f"damaged: {cause.message}"


def _unknown(store: Store, kind: str, column: Any) -> list[str]:
    with store.database.reading() as session:
        known = set(session.scalars(select(column)))
    return [key for key in store.blobs.children(kind) if key not in known and key.rsplit("/", 1)[-1] not in known]


def _chunks(store: Store, query: Any, order: Any) -> Iterator[Any]:
    with store.database.reading() as session:
        yield from session.execute(query.order_by(order).execution_options(yield_per=ROWS)).partitions()


def _read(store: Store, key: str, owner: str) -> Orphan:
    folder = store.blobs.local_folder(key)
    artifact = check_artifact(*read_artifact(folder))
    file = folder / REGISTRATION_FILE
    if file.is_file():
        return Orphan(key, artifact, Registration.model_validate_json(file.read_bytes()))
    registration = Registration(
        owner=owner,
        name=f"recovered-{artifact.content_hash[:8]}",
        version=1,
        job_id=None,
        created_at=int(artifact.manifest.created_at.timestamp()),
    )
    return Orphan(key, artifact, registration)


def _register(session: Session, store: Store, orphan: Orphan) -> str:
    known, folder = orphan.registration, store.blobs.local_folder(orphan.key)
    if known.job_id is not None and session.scalar(select(Version.id).where(Version.job_id == known.job_id)):
        return f"left {orphan.key}: job {known.job_id} has published another artifact"
    query = select(Intervention).where(Intervention.owner == known.owner, Intervention.name == known.name)
    row = session.scalar(query.with_for_update())
    if row is None:
        row = Intervention(owner=known.owner, name=known.name, next_version=1, created_at=known.created_at)
        session.add(row)
        session.flush()
    taken = select(Version.id).where(Version.intervention_id == row.id, Version.version == known.version)
    number = known.version if session.scalar(taken) is None else row.next_version
    row.next_version = max(row.next_version, number + 1)
    session.add(
        Version(
            owner=known.owner,
            intervention_id=row.id,
            version=number,
            content_hash=orphan.artifact.content_hash,
            bytes=sum((folder / name).stat().st_size for name in hash_files(folder)),
            parameters=orphan.artifact.manifest.parameters,
            manifest=orphan.artifact.manifest.model_dump(mode="json"),
            file_hashes=hash_files(folder),
            blob_key=orphan.key,
            job_id=known.job_id,
            created_at=known.created_at,
        )
    )
    session.flush()
    highest = session.scalars(select(func.max(Version.version)).where(Version.intervention_id == row.id)).one()
    session.merge(Alias(intervention_id=row.id, alias=LATEST, owner=known.owner, version=highest))
    return f"registered {known.name}@{number} from {orphan.key}"
