"""SHA-256 checksums of a folder's files. A job's row holds them, so a job reads back only whole files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder without subfolders, by name."""
    return {file.name: _sha256(file) for file in sorted(folder.iterdir())}


def find_damage(folder: Path, expected: Mapping[str, str]) -> str | None:
    """Return the first damage to a folder's files, as the end of a sentence; None if all are whole."""
    for name, sha256 in expected.items():
        try:
            found = _sha256(folder / name)
        except OSError as cause:
            return f"cannot be read: {name}: {cause.strerror}"
        if found != sha256:
            return f"is damaged: {name} has SHA-256 {found[:12]}..., expected {sha256[:12]}..."
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
