"""Scripts that no test runs import names that exist: benchmarks, examples, and the generators of docs and client."""

from __future__ import annotations

import ast
import importlib
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
