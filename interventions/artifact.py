"""Artifacts on disk: a folder of `manifest.json`, `edits.safetensors` and, where it was trained, `history.json`.

For the wire, a zip of them.

Reading trusts nothing: every field, name, shape, type and number is checked, sizes are bounded, nothing is unpickled.
Writing is all or nothing: a folder appears under its name only when it is complete and on the disk.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save

from reftserve.interventions.edit import TENSORS, LowRankEdit, PlacedEdit
from reftserve.interventions.errors import DtypeError, HashMismatch, ManifestError, ShapeError
from reftserve.interventions.history import HISTORY_FILE, History
from reftserve.interventions.manifest import BaseFingerprint, EditEntry, Manifest, Provenance
from reftserve.interventions.positions import Positions

MANIFEST_FILE = "manifest.json"
EDITS_FILE = "edits.safetensors"
REQUIRED_FILES = (MANIFEST_FILE, EDITS_FILE)
DTYPES = {"A": "F32", "b": "F32", "U": "F32", "act": "I8", "scale": "F32"}
MAX_BYTES = 1 << 30
# What zipfile raises for bytes that are no archive, or one with damage, encryption or a method that it does not know.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True, eq=False)
class Intervention:
    """A published intervention: its manifest and its edits, in the manifest's order.

    columns: the columns of all edits, in that order, as one edit; the edits are views of it.
    """

    manifest: Manifest
    columns: LowRankEdit
    edits: tuple[PlacedEdit, ...]

    @property
    def content_hash(self) -> str:
        """Identity of what it does; equal for equal edits at equal places."""
        return self.manifest.content_hash


def content_hash(edits: Sequence[PlacedEdit]) -> str:
    """SHA-256 over places and numbers of the edits, in order."""
    digest = hashlib.sha256()
    for placed in edits:
        digest.update(f"{placed.layer} {placed.positions} {placed.edit.content_hash}\n".encode())
    return digest.hexdigest()


def save_artifact(
    folder: Path,
    edits: Sequence[PlacedEdit],
    *,
    family: str,
    positions: str,
    rank: int,
    base: BaseFingerprint,
    tied: bool = True,
    parameters: int | None = None,
    provenance: Provenance | None = None,
    history: History | None = None,
) -> Manifest:
    """Write a new artifact folder; it must not exist. Raises OSError with nothing left behind."""
    manifest = Manifest(
        family=family,
        positions=positions,
        layers=sorted({placed.layer for placed in edits}),
        rank=rank,
        tied=tied,
        parameters=sum(p.edit.A.numel() + p.edit.b.numel() for p in edits) if parameters is None else parameters,
        edits=[
            EditEntry(key=str(i), layer=p.layer, positions=str(p.positions), rank=p.edit.rank)
            for i, p in enumerate(edits)
        ],
        base=base,
        content_hash=content_hash(edits),
        created_at=datetime.now(UTC),
        provenance=provenance or Provenance(),
    )
    tensors = {
        f"{i}.{name}": getattr(placed.edit, name).detach().cpu().contiguous()
        for i, placed in enumerate(edits)
        for name in TENSORS
    }
    files = {MANIFEST_FILE: manifest.model_dump_json(indent=2).encode(), EDITS_FILE: save(tensors)}
    if history is not None:
        files[HISTORY_FILE] = history.model_dump_json().encode()
    _write_folder(folder, files)
    return manifest


def load_artifact(folder: Path) -> Intervention:
    """Read and check an artifact folder.

    Raises an InterventionError that says what is wrong and what was expected; OSError when files cannot be read.
    """
    return parse_artifact(*read_artifact(folder))


def read_artifact(folder: Path) -> tuple[bytes, bytes]:
    """The bytes of an artifact folder's two files, unchecked: what `parse_artifact` takes.

    Raises OSError; ManifestError when one is too large to read.
    """
    return _bounded(folder / MANIFEST_FILE), _bounded(folder / EDITS_FILE)


def load_history(folder: Path) -> History | None:
    """Read an artifact folder's history; None when it has none.

    Raises ManifestError.
    """
    file = folder / HISTORY_FILE
    return History.parse(_bounded(file)) if file.exists() else None


def parse_artifact(manifest_bytes: bytes, edits_bytes: bytes) -> Intervention:
    """Check an artifact's two files.

    Raises ManifestError, ShapeError, DtypeError, NonFiniteError, PositionsError or HashMismatch.
    """
    try:
        manifest = Manifest.model_validate_json(manifest_bytes)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ManifestError(f"{MANIFEST_FILE}: {where or 'document'}: {first['msg']}") from cause
    stored = _tensors(deserialize, edits_bytes)
    expected = {f"{entry.key}.{name}" for entry in manifest.edits for name in TENSORS}
    if stored.keys() != expected:
        missing, surplus = sorted(expected - stored.keys()), sorted(stored.keys() - expected)
        raise ManifestError(f"{EDITS_FILE}: missing tensors {missing}, unexpected ones {surplus}")
    if not all(_is_as_said(entry, stored, manifest.base) for entry in manifest.edits):
        _refuse(manifest, edits_bytes)
    columns = _columns(manifest.edits, stored)
    parts = zip(manifest.edits, columns.split([entry.rank for entry in manifest.edits]), strict=True)
    edits = tuple(PlacedEdit(entry.layer, Positions.parse(entry.positions), part) for entry, part in parts)
    found = content_hash(edits)
    if found != manifest.content_hash:
        raise HashMismatch(f"content_hash is {manifest.content_hash}; the edits' hash is {found}")
    return Intervention(manifest, columns, edits)


def pack(folder: Path) -> bytes:
    """The artifact as one zip file for the wire."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in (*REQUIRED_FILES, HISTORY_FILE):
            if name in REQUIRED_FILES or (folder / name).exists():
                archive.write(folder / name, name)
    return buffer.getvalue()


def unpack(data: bytes, folder: Path, *, max_bytes: int = MAX_BYTES) -> Intervention:
    """Check a zipped artifact and write it to a new folder; nothing is written when it is refused.

    Raises an InterventionError; ManifestError when it is not a zip of exactly an artifact's files within `max_bytes`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = sorted(archive.namelist())
            if names not in (sorted(REQUIRED_FILES), sorted([*REQUIRED_FILES, HISTORY_FILE])):
                expected = f"exactly {MANIFEST_FILE} and {EDITS_FILE}, and perhaps {HISTORY_FILE}"
                raise ManifestError(f"the archive holds {names}; expected {expected}")
            contents = {name: _read_member(archive, name, max_bytes) for name in names}
    except UNREADABLE as cause:
        raise ManifestError(f"not a readable zip file: {cause}") from cause
    intervention = parse_artifact(contents[MANIFEST_FILE], contents[EDITS_FILE])
    if HISTORY_FILE in contents:
        History.parse(contents[HISTORY_FILE])
    _write_folder(folder, contents)
    return intervention


def _tensors(read: Callable[[bytes], Any], edits_bytes: bytes) -> dict[str, Any]:
    try:
        return dict(read(edits_bytes))
    except (SafetensorError, ValueError, KeyError) as cause:
        raise ManifestError(f"{EDITS_FILE} is not a safetensors file: {cause}") from cause


def _is_as_said(entry: EditEntry, stored: dict[str, Any], base: BaseFingerprint) -> bool:
    """Whether place, types and shapes of one edit are what the manifest says; looks at no number."""
    wide, narrow = [entry.rank, base.hidden_size], [entry.rank]
    shapes = {"A": wide, "b": narrow, "U": wide, "act": narrow, "scale": narrow}
    tensors = {name: stored[f"{entry.key}.{name}"] for name in TENSORS}
    return (
        base.hidden_size > 0
        and entry.layer < base.num_layers
        and all(tensors[name]["shape"] == shape for name, shape in shapes.items())
        and all(tensors[name]["dtype"] == DTYPES[name] for name in TENSORS)
    )


def _columns(entries: Sequence[EditEntry], stored: dict[str, Any]) -> LowRankEdit:
    """The columns of all edits, one below the other: their numbers are checked at once, not tensor by tensor."""
    tensors = []
    for name in TENSORS:
        dtype = np.dtype(np.int8 if DTYPES[name] == "I8" else np.float32)
        parts = [np.frombuffer(stored[f"{entry.key}.{name}"]["data"], dtype) for entry in entries]
        tensors.append(torch.from_numpy(np.concatenate(parts)))
    A, b, U, act, scale = tensors
    return LowRankEdit(A.view(len(b), -1), b, U.view(len(b), -1), act, scale)


def _refuse(manifest: Manifest, edits_bytes: bytes) -> None:
    """Raise what is wrong with the first edit that is not as the manifest says."""
    base, tensors = manifest.base, _tensors(load, edits_bytes)
    for entry in manifest.edits:
        edit = LowRankEdit(*(tensors[f"{entry.key}.{name}"] for name in TENSORS))
        if edit.A.dtype != torch.float32:
            raise DtypeError(f"edit {entry.key} is {edit.A.dtype}; artifacts hold torch.float32")
        if edit.rank != entry.rank:
            raise ShapeError(f"edit {entry.key} has rank {edit.rank}; the manifest says {entry.rank}")
        if edit.hidden_size != base.hidden_size:
            raise ShapeError(f"edit {entry.key} has hidden size {edit.hidden_size}; the base has {base.hidden_size}")
        if entry.layer >= base.num_layers:
            raise ShapeError(
                f"edit {entry.key} is at layer {entry.layer}; the base has layers 0 to {base.num_layers - 1}"
            )


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise ManifestError(f"{path.name} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    return path.read_bytes()


def _read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    # The size in the directory may lie, so what is read is bounded, not what is declared.
    with archive.open(name) as member:
        content = member.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ManifestError(f"{name} unpacks to more than {max_bytes} bytes")
    return content


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
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
