"""The registry: published interventions by name and version, their aliases, and the pins of running requests.

Publishing stores the artifact, then commits name, version and `latest`. Versions are immutable, numbers not reused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from reftserve.interventions.artifact import check_artifact, load_history, pack, read_artifact, unpack
from reftserve.interventions.history import HISTORY_FILE, History
from reftserve.interventions.intervention_errors import InterventionError
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from reftserve.server.registry import queries
from reftserve.server.registry.names import LATEST, Reference, check_alias, check_name
from reftserve.server.registry.stored_artifact import REGISTRATION_FILE, Registration, hash_files, require_intact
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.reserve import scratch_folder
from reftserve.server.storage.tables import Alias, Intervention, Version

BLOBS = "interventions"
PUBLISH_ATTEMPTS = 5


@dataclass(frozen=True)
class PublishedVersion:
    """A version. folder: of its artifact; `InterventionRegistry.resolve` has fetched it there."""

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
            file_hashes=hash_files(folder),
            blob_key=f"{BLOBS}/{uuid.uuid4().hex}",
            job_id=job_id,
            created_at=int(time.time()),
        )
        registration = Registration(
            owner=owner,
            name=name,
            version=self._next_version(owner, name),
            job_id=job_id,
            created_at=version.created_at,
        )
        self._blobs.put_folder(version.blob_key, folder, {REGISTRATION_FILE: registration.model_dump_json().encode()})
        with self._blobs.delete_blob_on_error(version.blob_key):
            committed = self._commit(owner, name, version, alongside)
        if committed.blob_key != version.blob_key:
            self._blobs.delete(version.blob_key)
        return self._published(name, committed)

    def upload(self, owner: str, name: str, data: bytes) -> PublishedVersion:
        """Publish a zipped artifact. Raises InvalidRequest when the data is no artifact of this base."""
        check_name(name)
        with scratch_folder("the artifact") as scratch:
            folder = scratch / "artifact"
            try:
                unpack(data, folder, max_bytes=self._max_artifact_bytes)
            except InterventionError as cause:
                raise InvalidRequest(str(cause), param="file", code=cause.code) from cause
            return self.publish(owner, name, folder)

    def download(self, owner: str, reference: Reference) -> bytes:
        """Return a version's artifact as a zip. Raises NotFound, also when its files are missing or damaged."""
        version = self.resolve(owner, reference)
        self._require_intact(version)
        return pack(version.folder)

    def history(self, owner: str, reference: Reference) -> tuple[PublishedVersion, History]:
        """Return a version and its training steps. Raises NotFound, also when the artifact has no history."""
        version = self.resolve(owner, reference)
        self._require_intact(version, only=HISTORY_FILE)
        history = load_history(version.folder)
        if history is None:
            raise NotFound(
                f"the artifact of {version.id} holds no training history", param="version", code="no_history"
            )
        return version, history

    def get(self, owner: str, name: str) -> queries.InterventionSummary:
        """Return one intervention's newest versions and its aliases. Raises NotFound with near names."""
        with self._database.reading() as session:
            return queries.summaries(session, [queries.find_intervention(session, owner, name)])[0]

    def list_page(
        self, owner: str, *, after: str | None = None, limit: int = 20, descending: bool = False
    ) -> tuple[list[queries.InterventionSummary], bool]:
        """Return interventions by name, from the one behind the name `after`, and whether more follow."""
        with self._database.reading() as session:
            found = queries.list_interventions(session, owner, after=after, limit=limit + 1, descending=descending)
        return found[:limit], len(found) > limit

    def list_names(self, owner: str, *, after: str | None, limit: int) -> tuple[list[tuple[str, str, int]], bool]:
        """Return name, owner and time of creation of interventions, by name, and whether more follow."""
        with self._database.reading() as session:
            found = queries.list_names(session, owner, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def list_versions(
        self, owner: str, name: str, *, after: int | None = None, limit: int = 20, descending: bool = True
    ) -> tuple[list[PublishedVersion], bool]:
        """Return versions by number, from the one behind `after`, and whether more follow. Raises NotFound."""
        with self._database.reading() as session:
            row = queries.find_intervention(session, owner, name)
            found = queries.list_versions(session, row, after=after, limit=limit + 1, descending=descending)
        return [self._published(name, version) for version in found[:limit]], len(found) > limit

    def find(self, owner: str, reference: Reference) -> PublishedVersion:
        """Return the version that a reference points at now, without its files. Raises NotFound with near names."""
        with self._database.reading() as session:
            found = queries.find_version(session, owner, reference)
            if found is None:
                row = queries.find_intervention(session, owner, reference.name)
                raise queries.no_version(session, row, reference)
        return self._published(reference.name, found)

    def resolve(self, owner: str, reference: Reference) -> PublishedVersion:
        """Return the version that a reference points at now, with its files. Raises NotFound, also without files."""
        version = self.find(owner, reference)
        self._fetch(version)
        return version

    def _require_intact(self, version: PublishedVersion, *, only: str | None = None) -> None:
        try:
            require_intact(version.folder, version.id, version.row, only=only)
        except NotFound:
            if not self._blobs.drop_copy(version.row.blob_key):
                raise
            self._fetch(version)
            require_intact(version.folder, version.id, version.row, only=only)

    def _fetch(self, version: PublishedVersion) -> None:
        try:
            self._blobs.local_folder(version.row.blob_key)
        except FileNotFoundError as cause:
            raise NotFound(
                f"the artifact of {version.id} is no longer in the store; publish it again, or restore "
                f"{version.row.blob_key} below {self._blobs.root}",
                param="model",
                code="intervention_content_missing",
            ) from cause

    def pin(self, version: PublishedVersion) -> None:
        """Keep a version's files until `unpin`; pins count. Raises NotFound if it was deleted before its first pin."""
        if not self._blobs.pins.add(version.row.blob_key):
            raise NotFound(f"intervention {version.id} has been deleted", param="model", code="model_not_found")

    def unpin(self, version: PublishedVersion) -> None:
        """Undo one `pin`; after the last one a thread removes the files of a version that was deleted meanwhile."""
        self._blobs.unpin(version.row.blob_key)

    def delete(self, owner: str, name: str, version: int | str | None = None, *, force: bool = False) -> list[str]:
        """Delete one version, or all versions of a name; return their ids. Running requests still finish.

        Raises NotFound; unless forced, Conflict if a request pins a version, or a user's alias points at the given one.
        """
        with self._database.session(may_use_reserve=True) as session:
            row = queries.find_intervention(session, owner, name, lock=True)
            going = self._going(session, row, version)
            if not force:
                self._refuse_in_use(session, row, going, whole=version is None)
            session.execute(delete(Version).where(Version.id.in_([id_ for id_, _, _ in going])))
            self._repoint(session, row, {number for _, number, _ in going})
        for key in self._blobs.pins.doom([key for _, _, key in going]):
            self._blobs.discard(key)
        return [f"{name}@{number}" for _, number, _ in going]

    def set_alias(self, owner: str, name: str, alias: str, version: int) -> queries.InterventionSummary:
        """Point a user's alias at a version. Raises NotFound, or InvalidRequest for an invalid alias."""
        check_alias(alias)
        with self._database.session() as session:
            row = queries.find_intervention(session, owner, name, lock=True)
            self._going(session, row, version)
            session.merge(Alias(intervention_id=row.id, alias=alias, owner=owner, version=version))
        return self.get(owner, name)

    def delete_alias(self, owner: str, name: str, alias: str) -> queries.InterventionSummary:
        """Remove a user's alias. Raises NotFound."""
        check_alias(alias)
        with self._database.session(may_use_reserve=True) as session:
            row = queries.find_intervention(session, owner, name, lock=True)
            found = session.get(Alias, (row.id, alias))
            if found is None:
                raise NotFound(f"intervention {name!r} has no alias {alias!r}", param="alias", code="alias_not_found")
            session.delete(found)
        return self.get(owner, name)

    def sweep(self, *, since: float = 0.0) -> list[str]:
        """Move artifacts newer than `since` (Unix seconds) that have no row to the trash; return their keys."""
        with self._database.reading() as session:
            known = set(session.scalars(select(Version.blob_key)))
        return self._blobs.sweep(BLOBS, known, since=since)

    def _next_version(self, owner: str, name: str) -> int:
        query = select(Intervention.next_version).where(Intervention.owner == owner, Intervention.name == name)
        with self._database.reading() as session:
            return session.scalar(query) or 1

    def _commit(self, owner: str, name: str, version: Version, alongside: Callable[[Session, str], object]) -> Version:
        """Number the version and commit it; return the job's earlier version if it has published already."""
        for attempt in range(PUBLISH_ATTEMPTS):
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
                if attempt == PUBLISH_ATTEMPTS - 1:
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

    def _going(self, session: Session, row: Intervention, version: int | str | None) -> list[tuple[int, int, str]]:
        """Return id, number and blob key of one version, or of all. Raises NotFound."""
        query = select(Version.id, Version.version, Version.blob_key).where(Version.intervention_id == row.id)
        if version is None:
            return [row._tuple() for row in session.execute(query.order_by(Version.version))]
        number = version
        if isinstance(version, str):
            alias = session.get(Alias, (row.id, version))
            number = 0 if alias is None else alias.version
        found = session.execute(query.where(Version.version == number)).first()
        if found is None:
            raise queries.no_version(session, row, Reference(row.name, version))
        return [found._tuple()]

    def _refuse_in_use(
        self, session: Session, row: Intervention, going: list[tuple[int, int, str]], *, whole: bool
    ) -> None:
        for _, number, key in going:
            pins = self._blobs.pins.count(key)
            if pins:
                raise Conflict(
                    f"{row.name}@{number} is used by {pins} running request(s); wait, or delete with force",
                    code="intervention_in_use",
                )
        if whole:
            return
        ((_, number, _),) = going
        query = select(Alias.alias).where(Alias.intervention_id == row.id, Alias.version == number)
        pointing = session.scalars(query.where(Alias.alias != LATEST).order_by(Alias.alias)).all()
        if pointing:
            raise Conflict(
                f"aliases {list(pointing)} point at {row.name}@{number}; move them, or delete with force",
                code="intervention_in_use",
            )

    def _repoint(self, session: Session, row: Intervention, gone: set[int]) -> None:
        """Remove aliases of deleted versions; `latest` goes to the highest one that remains."""
        highest = session.scalar(select(func.max(Version.version)).where(Version.intervention_id == row.id))
        for alias in session.scalars(select(Alias).where(Alias.intervention_id == row.id)):
            if alias.version not in gone:
                continue
            if alias.alias == LATEST and highest is not None:
                alias.version = highest
            else:
                session.delete(alias)

    def _published(self, name: str, row: Version) -> PublishedVersion:
        return PublishedVersion(name, row, self._blobs.local_path(row.blob_key))


_VERSION_COLUMNS = (
    "owner",
    "content_hash",
    "bytes",
    "parameters",
    "manifest",
    "file_hashes",
    "blob_key",
    "job_id",
    "created_at",
)
