"""Every package's docstring lists its modules, so that a newcomer can find a file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    init.parent.relative_to(ROOT)
    for init in (ROOT / "server").rglob("__init__.py")
    if "migrations" not in init.parts and init.parent.name not in ("server", "cpu_kernels")
)


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_package_lists_its_modules(package: Path) -> None:
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    modules = {file.stem for file in (ROOT / package).glob("*.py")} - {"__init__"}
    assert {module for module in modules if module not in text} == set()
