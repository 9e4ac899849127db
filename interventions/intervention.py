"""Interventions as tensors: reads and writes artifact folders. `artifact.py` defines their format and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save

from reftserve.interventions.artifact import (
    EDITS_FILE,
    MANIFEST_FILE,
    EditSite,
    check_artifact,
    content_hash,
    read_artifact,
    write_folder,
)
from reftserve.interventions.columns import TENSORS
from reftserve.interventions.edit import LowRankEdit, PlacedEdit, compose
from reftserve.interventions.edited_runs import EditedRuns
from reftserve.interventions.history import HISTORY_FILE, History
from reftserve.interventions.manifest import BaseFingerprint, EditEntry, Manifest, Provenance


@dataclass(frozen=True, eq=False)
class Intervention:
    """An intervention read from an artifact. columns: those of all edits as one edit. sites: in the columns' order."""

    manifest: Manifest
    columns: LowRankEdit
    sites: tuple[EditSite, ...]

    @property
    def content_hash(self) -> str:
        """The identity of the edits: equal for equal edits at equal sites."""
        return self.manifest.content_hash

    @cached_property
    def edits(self) -> tuple[PlacedEdit, ...]:
        """The single edits, as views of `columns`."""
        parts = zip(self.sites, self.columns.split([site.rank for site in self.sites]), strict=True)
        return tuple(PlacedEdit(site.layer, site.positions, part) for site, part in parts)

    @cached_property
    def edited_runs(self) -> EditedRuns:
        """Which of its edits touch which tokens of a request."""
        return EditedRuns(self.content_hash, [site.positions for site in self.sites])


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
    """Write a new artifact folder atomically and return its manifest. Raises OSError when the folder exists."""
    sites = tuple(EditSite(placed.layer, placed.positions, placed.edit.rank) for placed in edits)
    columns = compose([placed.edit for placed in edits])
    manifest = Manifest(
        family=family,
        positions=positions,
        layers=sorted({site.layer for site in sites}),
        rank=rank,
        tied=tied,
        parameters=columns.A.numel() + columns.b.numel() if parameters is None else parameters,
        edits=[EditEntry(layer=p.layer, positions=str(p.positions), rank=p.rank) for p in sites],
        base=base,
        content_hash=content_hash(sites, columns.content_hash),
        created_at=datetime.now(UTC),
        provenance=provenance or Provenance(),
    )
    tensors = {name: getattr(columns, name).detach().cpu().contiguous() for name in TENSORS}
    files = {MANIFEST_FILE: manifest.model_dump_json(indent=2).encode(), EDITS_FILE: save(tensors)}
    if history is not None:
        files[HISTORY_FILE] = history.model_dump_json().encode()
    write_folder(folder, files)
    return manifest


def load_artifact(folder: Path) -> Intervention:
    """Read and check an artifact folder. Raises an InterventionError, or OSError for an unreadable file."""
    return parse_artifact(*read_artifact(folder))


def parse_artifact(manifest_bytes: bytes, edits_bytes: bytes) -> Intervention:
    """Check an artifact's bytes and return its tensors. Raises the errors of `check_artifact`."""
    artifact = check_artifact(manifest_bytes, edits_bytes)
    columns = LowRankEdit.of_checked({name: torch.from_numpy(array) for name, array in artifact.columns.items()})
    return Intervention(artifact.manifest, columns, artifact.sites)
