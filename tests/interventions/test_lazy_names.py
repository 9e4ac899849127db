"""The package's names load their modules on first use, and mean the same in any import order."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import reftserve.interventions
from reftserve.interventions import FAMILIES, Family

TORCH_FREE = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from reftserve.interventions import FAMILIES, BaseFingerprint, History, InterventionConfig, ManifestError, Positions
from reftserve.interventions import check_artifact, fingerprint, load_history, pack, unpack
assert "loreft" in FAMILIES and len(list(FAMILIES)) == len(FAMILIES)
try:
    unpack(b"", None)
except ManifestError as refused:
    print(refused)
"""


def test_the_names_that_the_http_process_uses_load_no_torch() -> None:
    ended = subprocess.run([sys.executable, "-c", TORCH_FREE], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "not a readable zip file" in ended.stdout


def test_every_public_name_exists_after_all_modules_are_loaded() -> None:
    for module in pkgutil.iter_modules(reftserve.interventions.__path__):
        importlib.import_module(f"reftserve.interventions.{module.name}")
    for name in reftserve.interventions.__all__:
        assert not isinstance(getattr(reftserve.interventions, name), ModuleType), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        reftserve.interventions.nothing  # noqa: B018


def test_every_family_is_found_by_its_name() -> None:
    assert all(issubclass(FAMILIES[name], Family) for name in FAMILIES)
    with pytest.raises(KeyError):
        FAMILIES["unknown"]
