"""The registry: published interventions by name and version, their aliases, and the pins of running requests.

Publishing stores the artifact, then commits name, version and `latest`. Versions are immutable, numbers not reused.
"""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, selectinload

from reftserve.interventions.artifact import check_artifact, load_history, pack, read_artifact, unpack
from reftserve.interventions.history import History
from reftserve.interventions.intervention_errors import InterventionError
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from reftserve.server.registry.names import LATEST, Reference, check_alias, check_name, suggestion
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Alias, Intervention, Version

BLOBS = "interventions"


@dataclass(frozen=True)
class PublishedVersion:
    """A version, with the local folder of its artifact."""

    name: str
    row: Version
    folder: Path

    @property
    def id(self) -> str:
        """The version's id: `name@version`."""
        return f"{self.name}@{self.row.version}"


class InterventionRegistry:
    """All owners' interventions on one base. max_artifact_bytes: of an unpacked upload; max_owner_bytes: per owner."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        base: BaseFingerprint,
        *,
        override_fingerprint: bool = False,
        max_artifact_bytes: int = 1 << 30,
        max_owner_bytes: int = 16 << 30,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._base = base
        self._override = override_fingerprint
        self._max_artifact_bytes = max_artifact_bytes
        self._max_owner_bytes = max_owner_bytes
        self._lock = threading.Lock()
        self._pins: Counter[str] = Counter()
        self._doomed: set[str] = set()

    def publish(
        self,
        owner: str,
        name: str,
        folder: Path,
        *,
        job_id: str | None = None,
        alongside: Callable[[Session, str], object] = lambda session, published_id: None,
    ) -> PublishedVersion:
        """Publish an artifact folder as the next version of `name`; a job's repeated call returns the same version.

        alongside: called with `name@version` in the transaction. Raises InvalidRequest, QuotaExceeded or StorageFull.
        """
        check_name(name)
        try:
            artifact = check_artifact(*read_artifact(folder))
            self._base.require(artifact.manifest.base, override=self._override)
        except InterventionError as cause:
            raise InvalidRequest(str(cause), param="file", code=cause.code) from cause
        version = Version(
            owner=owner,
            content_hash=artifact.content_hash,
            bytes=sum(file.stat().st_size for file in folder.iterdir()),
            parameters=artifact.manifest.parameters,
            manifest=artifact.manifest.model_dump(mode="json"),
            blob_key=f"{BLOBS}/{uuid.uuid4().hex}",
            job_id=job_id,
            created_at=int(time.time()),
        )
        self._blobs.put_folder(version.blob_key, folder)
        with self._blobs.delete_blob_on_error(version.blob_key):
            committed = self._commit(owner, name, version, alongside)
        if committed.blob_key != version.blob_key:
            self._blobs.delete(version.blob_key)
        return self._published(name, committed)

    def upload(self, owner: str, name: str, data: bytes) -> PublishedVersion:
        """Publish a zipped artifact. Raises InvalidRequest when the data is no artifact of this base."""
        check_name(name)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            try:
                unpack(data, folder, max_bytes=self._max_artifact_bytes)
            except InterventionError as cause:
                raise InvalidRequest(str(cause), param="file", code=cause.code) from cause
            return self.publish(owner, name, folder)

    def download(self, owner: str, reference: Reference) -> bytes:
        """Return a version's artifact as a zip. Raises NotFound."""
        return pack(self.resolve(owner, reference).folder)

    def history(self, owner: str, reference: Reference) -> tuple[PublishedVersion, History]:
        """Return a version and its training steps. Raises NotFound, also when the artifact has no history."""
        version = self.resolve(owner, reference)
        history = load_history(version.folder)
        if history is None:
            raise NotFound(
                f"the artifact of {version.id} holds no training history", param="version", code="no_history"
            )
        return version, history

    def list_all(self, owner: str) -> list[Intervention]:
        """Return an owner's interventions with their versions and aliases, by name."""
        query = (
            select(Intervention)
            .where(Intervention.owner == owner, Intervention.versions.any())
            .options(selectinload(Intervention.versions), selectinload(Intervention.aliases))
            .order_by(Intervention.name)
        )
        with self._database.reading() as session:
            return list(session.scalars(query))

    def get(self, owner: str, name: str) -> Intervention:
        """Return one intervention with its versions and aliases. Raises NotFound with near names."""
        with self._database.reading() as session:
            return self._get(session, owner, name)

    def resolve(self, owner: str, reference: Reference) -> PublishedVersion:
        """Return the immutable version that a reference points at now. Raises NotFound with near names."""
        with self._database.reading() as session:
            found = self._version(self._get(session, owner, reference.name), reference)
        return self._published(reference.name, found)

    def pin(self, version: PublishedVersion) -> None:
        """Keep a version's files until `unpin`; pins count. Raises NotFound if it was deleted before its first pin."""
        key = version.row.blob_key
        with self._lock:
            if not self._pins[key] and (key in self._doomed or not version.folder.exists()):
                del self._pins[key]
                raise NotFound(f"intervention {version.id} has been deleted", param="model", code="model_not_found")
            self._pins[key] += 1

    def unpin(self, version: PublishedVersion) -> None:
        """Undo one `pin`; the last one removes the files of a version that was deleted meanwhile."""
        key = version.row.blob_key
        with self._lock:
            self._pins[key] -= 1
            is_unpinned = self._pins[key] == 0
            if is_unpinned:
                del self._pins[key]
            remove = is_unpinned and key in self._doomed
            self._doomed -= {key} if remove else set()
        if remove:
            self._blobs.delete(key)

    def delete(self, owner: str, name: str, version: int | str | None = None, *, force: bool = False) -> list[str]:
        """Delete one version, or all versions of a name; return their ids. Running requests still finish.

        Raises NotFound; unless forced, Conflict if a request pins a version, or a user's alias points at the given one.
        """
        with self._lock, self._database.session() as session:
            row = self._get(session, owner, name)
            going = list(row.versions) if version is None else [self._version(row, Reference(name, version))]
            if not force:
                self._refuse_in_use(row, going, whole=version is None)
            for gone in going:
                session.delete(gone)
            remaining = [v.version for v in row.versions if v not in going]
            self._repoint(session, row, remaining)
            session.commit()
            keys = [gone.blob_key for gone in going]
            self._doomed |= {key for key in keys if self._pins[key]}
            removable = [key for key in keys if key not in self._doomed]
        for key in removable:
            self._blobs.delete(key)
        return [f"{name}@{gone.version}" for gone in going]

    def set_alias(self, owner: str, name: str, alias: str, version: int) -> Intervention:
        """Point a user's alias at a version. Raises NotFound, or InvalidRequest for an invalid alias."""
        check_alias(alias)
        with self._database.session() as session:
            row = self._get(session, owner, name)
            self._version(row, Reference(name, version))
            session.merge(Alias(intervention_id=row.id, alias=alias, owner=owner, version=version))
        return self.get(owner, name)

    def delete_alias(self, owner: str, name: str, alias: str) -> Intervention:
        """Remove a user's alias. Raises NotFound."""
        check_alias(alias)
        with self._database.session() as session:
            row = self._get(session, owner, name)
            found = session.get(Alias, (row.id, alias))
            if found is None:
                raise NotFound(f"intervention {name!r} has no alias {alias!r}", param="alias", code="alias_not_found")
            session.delete(found)
        return self.get(owner, name)

    def sweep(self, *, since: float = 0.0) -> list[str]:
        """Remove artifacts newer than `since` (Unix seconds) that have no row; return their keys."""
        with self._database.reading() as session:
            known = set(session.scalars(select(Version.blob_key)))
        return self._blobs.sweep(BLOBS, known, since=since)

    def _commit(self, owner: str, name: str, version: Version, alongside: Callable[[Session, str], object]) -> Version:
        """Number the version and commit it; return the job's earlier version if it has published already."""
        for attempt in range(5):
            try:
                with self._database.session() as session:
                    if version.job_id is not None:
                        published = session.scalar(select(Version).where(Version.job_id == version.job_id))
                        if published is not None:
                            alongside(session, f"{name}@{published.version}")
                            return published
                    self._require_quota(session, owner, version.bytes)
                    query = select(Intervention).where(Intervention.owner == owner, Intervention.name == name)
                    row = session.scalar(query.with_for_update())
                    if row is None:
                        row = Intervention(owner=owner, name=name, next_version=1, created_at=version.created_at)
                        session.add(row)
                        session.flush()
                    copy = Version(**{c: getattr(version, c) for c in _VERSION_COLUMNS})
                    copy.intervention_id, copy.version = row.id, row.next_version
                    row.next_version += 1
                    session.add(copy)
                    session.merge(Alias(intervention_id=row.id, alias=LATEST, owner=owner, version=copy.version))
                    alongside(session, f"{name}@{copy.version}")
                return copy
            except IntegrityError:
                # Another process created the same name, or published for the same job, in the same moment.
                if attempt == 4:
                    raise
        raise AssertionError("unreachable")

    def _require_quota(self, session: Session, owner: str, more: int) -> None:
        self._database.advisory_lock(session, f"interventions of {owner}")
        used = int(session.scalar(select(func.coalesce(func.sum(Version.bytes), 0)).where(Version.owner == owner)) or 0)
        if used + more > self._max_owner_bytes:
            raise QuotaExceeded(
                f"the artifact has {more} bytes, and interventions use {used} of {self._max_owner_bytes} bytes; delete "
                "versions first"
            )

    def _get(self, session: Session, owner: str, name: str) -> Intervention:
        query = (
            select(Intervention)
            .where(Intervention.owner == owner, Intervention.name == name, Intervention.versions.any())
            .options(selectinload(Intervention.versions), selectinload(Intervention.aliases))
        )
        row = session.scalar(query)
        if row is None:
            names = session.scalars(
                select(Intervention.name).where(Intervention.owner == owner, Intervention.versions.any())
            )
            raise NotFound(f"no intervention {name!r}.{suggestion(name, names)}", param="model", code="model_not_found")
        return row

    def _version(self, row: Intervention, reference: Reference) -> Version:
        wanted = reference.version
        aliases = {alias.alias: alias.version for alias in row.aliases}
        number = wanted if isinstance(wanted, int) else aliases.get(wanted)
        for version in row.versions:
            if version.version == number:
                return version
        raise NotFound(
            f"intervention {row.name!r} has no version {wanted!r}; it has versions "
            f"{[version.version for version in row.versions]} and aliases {sorted(aliases)}",
            param="model",
            code="model_not_found",
        )

    def _refuse_in_use(self, row: Intervention, going: list[Version], *, whole: bool) -> None:
        for version in going:
            pins = self._pins[version.blob_key]
            if pins:
                raise Conflict(
                    f"{row.name}@{version.version} is used by {pins} running request(s); wait, or delete with force",
                    code="intervention_in_use",
                )
            pointing = [a.alias for a in row.aliases if a.version == version.version and a.alias != LATEST]
            if pointing and not whole:
                raise Conflict(
                    f"aliases {pointing} point at {row.name}@{version.version}; move them, or delete with force",
                    code="intervention_in_use",
                )

    def _repoint(self, session: Session, row: Intervention, remaining: list[int]) -> None:
        for alias in row.aliases:
            if alias.version in remaining:
                continue
            if alias.alias == LATEST and remaining:
                alias.version = max(remaining)
            else:
                session.delete(alias)

    def _published(self, name: str, row: Version) -> PublishedVersion:
        return PublishedVersion(name, row, self._blobs.local_folder(row.blob_key))


_VERSION_COLUMNS = ("owner", "content_hash", "bytes", "parameters", "manifest", "blob_key", "job_id", "created_at")
