"""Artifacts and registries for tests of publishing. `python published.py ...` publishes in a separate process."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch

from reftserve.interventions import BaseFingerprint, History, LowRankEdit, PlacedEdit, Positions, save_artifact
from reftserve.server.errors import StorageFull
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database

OWNER = "default"
BASE = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=64, num_layers=4, vocab_size=40, weights_hash="w")


def make_artifact(
    folder: Path, *, seed: int = 0, rank: int = 2, base: BaseFingerprint = BASE, history: History | None = None
) -> Path:
    draw = torch.Generator().manual_seed(seed)
    A, U = (torch.randn(rank, base.hidden_size, generator=draw) for _ in range(2))
    edit = LowRankEdit(A, torch.zeros(rank), U, torch.zeros(rank, dtype=torch.int8), torch.ones(rank))
    placed = [PlacedEdit(1, Positions.parse("l1"), edit)]
    save_artifact(folder, placed, family="loreft", positions="l1", rank=rank, base=base, history=history)
    return folder


def open_registry(
    folder: Path, *, blob_url: str | None = None, override: bool = False, **limits: int
) -> InterventionRegistry:
    database = Database(f"sqlite:///{folder / 'test.db'}")
    database.migrate()
    blobs = BlobStore(blob_url or str(folder / "blobs"), cache=folder / "cache")
    return InterventionRegistry(database, blobs, BASE, override_fingerprint=override, **limits)


def main(what: str, folder: Path, artifact: Path, name: str) -> None:
    """Publish many times, on a full disk, or with a kill in the middle."""
    registry = open_registry(folder)
    if what == "many":
        for _ in range(10):
            print(registry.publish(OWNER, name, artifact).id, flush=True)
    elif what == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        try:
            registry.publish(OWNER, name, artifact)
        except StorageFull as cause:
            print(cause.message)
    elif what == "killed":
        # The worst moment: the artifact is stored, its row is not.
        registry._commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
        registry.publish(OWNER, name, artifact)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
