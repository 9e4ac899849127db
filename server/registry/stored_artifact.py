"""The files of a published artifact in the store: their hashes, and the registration that a lost row is made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from reftserve.interventions.artifact import EDITS_FILE, MANIFEST_FILE, check_artifact, read_artifact
from reftserve.interventions.history import HISTORY_FILE
from reftserve.interventions.intervention_errors import InterventionError
from reftserve.server.errors import NotFound
from reftserve.server.storage.tables import Version

ARTIFACT_FILES = (MANIFEST_FILE, EDITS_FILE, HISTORY_FILE)
REGISTRATION_FILE = "registration.json"  # stored beside the artifact's files; downloads leave it out


class Registration(BaseModel):
    """What the database says of a version and the artifact does not. version: may differ after a race of publishers."""

    model_config = ConfigDict(extra="ignore")

    owner: str
    name: str
    version: int = Field(ge=1)
    job_id: str | None
    created_at: int


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of an artifact's files, by name."""
    return {name: _sha256(folder / name) for name in ARTIFACT_FILES if (folder / name).is_file()}


def require_intact(folder: Path, version_id: str, row: Version, *, only: str | None = None) -> None:
    """Raise NotFound, naming both hashes, if a file differs from the one that was published. only: one file's name."""
    for name, expected in (row.file_hashes or {}).items():
        if only in (None, name):
            _require_hash(folder / name, version_id, expected)
    if row.file_hashes is None and only is None:
        _require_content(folder, version_id, row)


def _require_hash(file: Path, version_id: str, expected: str) -> None:
    if not file.is_file():
        raise _damaged(version_id, f"its {file.name} is missing; expected SHA-256 {expected}")
    found = _sha256(file)
    if found != expected:
        raise _damaged(version_id, f"its {file.name} has SHA-256 {found}; expected {expected}")


def _require_content(folder: Path, version_id: str, row: Version) -> None:
    # Rows older than the hashes of files know the hash of the edits.
    try:
        found = check_artifact(*read_artifact(folder)).content_hash
    except (InterventionError, OSError) as cause:
        raise _damaged(version_id, str(cause)) from cause
    if found != row.content_hash:
        raise _damaged(version_id, f"its content hash is {found}; expected {row.content_hash}")


def _damaged(version_id: str, reason: str) -> NotFound:
    return NotFound(
        f"the stored artifact of {version_id} is damaged: {reason}. Restore it from a backup, or publish it again",
        param="version",
        code="intervention_content_damaged",
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
