"""Workspaces for training jobs on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from workspace import Workspace

from reftserve.server.training import progress


@pytest.fixture(autouse=True)
def each_step_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each step's metrics at once; the tests of `progress.py` choose their own interval."""
    monkeypatch.setattr(progress, "INTERVAL_S", 0)


@pytest.fixture
def workspace(tiny_llama_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(tiny_llama_folder, tmp_path)


@pytest.fixture
def expiring(tiny_llama_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(tiny_llama_folder, tmp_path, lease_s=1e-6)
