"""Workspaces for training jobs on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from workspace import Workspace


@pytest.fixture
def workspace(tiny_llama_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(tiny_llama_folder, tmp_path)


@pytest.fixture
def expiring(tiny_llama_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(tiny_llama_folder, tmp_path, lease_s=1e-6)
