"""Artifacts on disk: their files, the checks when reading them, and atomic writing. `intervention.py` makes tensors.

    manifest.json       base, family, positions and layers of the edits, and their provenance (`manifest.py`)
    edits.safetensors   five tensors, the concatenated columns of all edits: few, for checks while requests wait
    history.json        the training history, optional (`history.py`)

The wire format is a zip of this folder. Reading checks every field, name, shape, type and number, bounds every size and
unpickles nothing. A new folder appears under its name only when it is complete and on the disk. Nothing needs torch.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from reftserve.interventions.columns import TENSORS, Columns, hash_columns, read_columns
from reftserve.interventions.history import HISTORY_FILE, MAX_HISTORY_BYTES, History
from reftserve.interventions.intervention_errors import (
    HashMismatch,
    InterventionError,
    ManifestError,
    ShapeError,
    shorten,
)
from reftserve.interventions.manifest import Manifest
from reftserve.interventions.positions import Positions
from reftserve.interventions.strict_json import check_json, invalid_document

MANIFEST_FILE = "manifest.json"
EDITS_FILE = "edits.safetensors"
REQUIRED_FILES = (MANIFEST_FILE, EDITS_FILE)
EXPECTED_FILES = f"{MANIFEST_FILE}, {EDITS_FILE} and optionally {HISTORY_FILE}"
MAX_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 1 << 20
MEMBER_BYTES = {MANIFEST_FILE: MAX_MANIFEST_BYTES, HISTORY_FILE: MAX_HISTORY_BYTES, EDITS_FILE: MAX_BYTES}
# Weights and JSON shrink by far less; zeros shrink to a thousandth, and a small file of zeros is nothing to fear.
MAX_RATIO, SMALL_BYTES = 100, 1 << 20
ZIP_MEMBER = b"PK\1\2"  # begins each entry of a zip's directory
MAX_ZIP_MEMBERS = 16  # random numbers may spell it too
# The errors of zipfile for data that is not an archive, is damaged or encrypted, or uses an unknown method.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
)


@dataclass(frozen=True)
class EditSite:
    """The layer, positions and rank of one edit."""

    layer: int
    positions: Positions
    rank: int


@dataclass(frozen=True, eq=False)
class Artifact:
    """A checked artifact: its manifest, the sites of its edits, and their concatenated columns."""

    manifest: Manifest
    sites: tuple[EditSite, ...]
    columns: Columns

    @property
    def content_hash(self) -> str:
        """The identity of the edits: equal for equal edits at equal sites."""
        return self.manifest.content_hash


def content_hash(sites: Sequence[EditSite], columns_hash: str) -> str:
    """Return the SHA-256 over the edits' sites and numbers, in order. columns_hash: of all columns as one edit."""
    digest = hashlib.sha256()
    for site in sites:
        digest.update(f"{site.layer} {site.positions} {site.rank}\n".encode())
    digest.update(columns_hash.encode())
    return digest.hexdigest()


def read_artifact(folder: Path) -> tuple[bytes, bytes]:
    """Return the unchecked manifest and edits. Raises OSError; ManifestError when a file is too large."""
    return _bounded(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES), _bounded(folder / EDITS_FILE, MAX_BYTES)


def load_history(folder: Path) -> History | None:
    """Return an artifact folder's training history, or None. Raises ManifestError."""
    file = folder / HISTORY_FILE
    return History.parse(_bounded(file, MAX_HISTORY_BYTES)) if file.exists() else None


def check_artifact(manifest_bytes: bytes, edits_bytes: bytes) -> Artifact:
    """Check a manifest and edits. Raises an InterventionError, except FingerprintMismatch."""
    check_json(manifest_bytes, MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.model_validate_json(manifest_bytes)
    except ValidationError as cause:
        raise invalid_document(MANIFEST_FILE, cause) from cause
    sites = tuple(EditSite(entry.layer, Positions.parse(entry.positions), entry.rank) for entry in manifest.edits)
    columns = read_columns(edits_bytes, EDITS_FILE)
    _check_fit(sites, columns, manifest)
    found = content_hash(sites, hash_columns(columns))
    if found != manifest.content_hash:
        raise HashMismatch(f"content_hash is {manifest.content_hash}; the edits' hash is {found}")
    return Artifact(manifest, sites, columns)


def pack(folder: Path) -> bytes:
    """Return the artifact folder as a zip file for the wire."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in (*REQUIRED_FILES, HISTORY_FILE):
            if name in REQUIRED_FILES or (folder / name).exists():
                archive.write(folder / name, name)
    return buffer.getvalue()


def unpack(data: bytes, folder: Path, *, max_bytes: int = MAX_BYTES) -> Artifact:
    """Check a zipped artifact, then write it to a new folder. max_bytes: of all files together, unpacked.

    Raises an InterventionError.
    """
    num_members = data.count(ZIP_MEMBER)
    if num_members > MAX_ZIP_MEMBERS:  # before zipfile makes an object of each
        raise ManifestError(f"the archive holds about {num_members} files; expected {EXPECTED_FILES}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = sorted(archive.namelist())
            if names not in (sorted(REQUIRED_FILES), sorted([*REQUIRED_FILES, HISTORY_FILE])):
                raise ManifestError(f"the archive holds {shorten(str(names))}; expected {EXPECTED_FILES}")
            contents: dict[str, bytes] = {}
            for name in sorted(names, key=MEMBER_BYTES.__getitem__):
                room = max_bytes - sum(map(len, contents.values()))
                contents[name] = _read_member(archive, name, min(MEMBER_BYTES[name], room), len(data))
    except InterventionError:
        raise
    except UNREADABLE as cause:
        raise ManifestError(f"not a readable zip file: {shorten(str(cause))}") from cause
    artifact = check_artifact(contents[MANIFEST_FILE], contents[EDITS_FILE])
    if HISTORY_FILE in contents:
        History.parse(contents[HISTORY_FILE])
    write_folder(folder, contents)
    return artifact


def _check_fit(sites: Sequence[EditSite], columns: Columns, manifest: Manifest) -> None:
    base = manifest.base
    found, hidden_size = columns["A"].shape
    rank = sum(site.rank for site in sites)
    if found != rank:
        raise ShapeError(f"{EDITS_FILE} holds {found} columns; the manifest declares {rank}")
    if hidden_size != base.hidden_size:
        raise ShapeError(f"edits have hidden size {hidden_size}; the base has {base.hidden_size}")
    highest = max(site.layer for site in sites)
    if highest >= base.num_layers:
        raise ShapeError(f"an edit is at layer {highest}; the base has layers 0 to {base.num_layers - 1}")
    numbers = sum(columns[name].size for name in TENSORS)
    if manifest.parameters > numbers:
        raise ManifestError(f"parameters is {manifest.parameters}; the edits hold {numbers} numbers")


def _bounded(path: Path, max_bytes: int) -> bytes:
    if path.stat().st_size > max_bytes:
        raise ManifestError(f"{path.name} has {path.stat().st_size} bytes; at most {max_bytes} are read")
    return path.read_bytes()


def _read_member(archive: zipfile.ZipFile, name: str, max_bytes: int, num_bytes: int) -> bytes:
    """Return a file's content. num_bytes: of the archive."""
    # The archive's directory may declare false sizes, so bound the bytes that are read.
    packed = min(archive.getinfo(name).compress_size, num_bytes)
    max_bytes = min(max_bytes, max(SMALL_BYTES, MAX_RATIO * packed))
    with archive.open(name) as member:
        content = member.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ManifestError(f"{name} unpacks to more than {max_bytes} bytes")
    return content


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a new folder atomically. Raises OSError when the folder exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        for name, content in files.items():
            with (scratch / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        scratch.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
