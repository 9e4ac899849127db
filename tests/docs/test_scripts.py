"""Scripts that no test runs import names that exist: benchmarks, examples, and the generators of docs and client."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    script.relative_to(ROOT)
    for folder in ("benchmarks", "examples", "docs", ".ci")
    for script in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_imports_names_that_exist(script: Path) -> None:
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    missing = [
        f"{node.module}.{alias.name}"
        for node in imports
        if str(node.module).startswith("reftserve.")
        for alias in node.names
        if not hasattr(importlib.import_module(str(node.module)), alias.name)
    ]
    assert missing == []


@pytest.mark.parametrize("release", ["2.7.18", "3.10.13"])
def test_make_names_the_python_that_it_needs_in_one_sentence(release: str, tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    version = tuple(map(int, release.split(".")))
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo Python {release} && exit\nexec {sys.executable} -c "{code}" "$2"\n'
    )
    old.chmod(0o755)
    said = _refused(tmp_path, f"PYTHON={old}")
    assert (
        f"needs Python 3.11 or newer, and {old} is Python {release}; name another one: make PYTHON=python3.12" in said
    )


def test_make_says_that_there_is_no_such_python(tmp_path: Path) -> None:
    assert "needs Python 3.11 or newer, and no-python is " in _refused(tmp_path, "PYTHON=no-python")


def _refused(folder: Path, *variables: str) -> str:
    command = ["make", "install", f"VENV={folder / 'venv'}", *variables]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert not (folder / "venv").exists()
    [said] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert "Traceback" not in said
    return said
