"""Loads from disk: a thread reads files during the steps; the engine checks them between steps as time allows."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from engine_oracle import save_random

from reftserve.interventions import load_artifact
from reftserve.server.engine import loader as loader_module
from reftserve.server.engine.loader import Loaded, Loader
from reftserve.server.engine.messages import InterventionRef


def ref(folder: Path) -> InterventionRef:
    return InterventionRef(str(folder), load_artifact(folder).content_hash)


def wait_until_read(loader: Loader) -> None:
    loader.close()


def collect_all(loader: Loader) -> list[Loaded]:
    found = []
    while loader.pending:
        found += loader.collect(1.0)
        time.sleep(0.001)
    return found


def test_a_call_without_time_checks_one_file_so_that_all_are_eventually_loaded(artifacts: list[Path]) -> None:
    loader = Loader(1 << 20)
    refs = [ref(folder) for folder in artifacts]
    for each in refs:
        loader.request(each)
    wait_until_read(loader)
    hashes = []
    for _ in refs:
        (loaded,) = loader.collect(0.0)
        hashes.append(loaded.content_hash)
    assert hashes == [each.content_hash for each in refs]
    assert not loader.pending
    assert loader.collect(0.0) == []


def test_a_call_with_time_checks_every_file_that_was_read(artifacts: list[Path]) -> None:
    loader = Loader(1 << 20)
    for folder in artifacts:
        loader.request(ref(folder))
    wait_until_read(loader)
    assert len(loader.collect(60.0)) == len(artifacts)


def test_large_files_are_loaded_as_small_ones(artifacts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "LARGE_BYTES", 0)
    loader = Loader(1 << 20)
    for folder in artifacts:
        loader.request(ref(folder))
    for loaded in collect_all(loader):
        assert loaded.error is None
        assert loader.get(loaded.content_hash) is loaded.intervention
    loader.close()


@pytest.mark.parametrize("large_bytes", [0, 1 << 20])
def test_a_failed_load_reports_the_reason(large_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "LARGE_BYTES", large_bytes)
    broken = save_random(tmp_path / "broken", [(0, "l1")], rank=1)
    content_hash = load_artifact(broken).content_hash
    (broken / "edits.safetensors").write_bytes(b"nothing")
    loader = Loader(1 << 20)
    loader.request(InterventionRef(str(broken), content_hash))
    loader.request(InterventionRef(str(tmp_path / "nowhere"), "1" * 64))
    unreadable, missing = collect_all(loader)
    assert unreadable.intervention is None
    assert "broken: edits.safetensors is not a safetensors file" in str(unreadable.error)
    assert missing.intervention is None
    assert "nowhere" in str(missing.error)
    loader.close()


def test_the_least_recently_used_is_dropped_when_the_budget_is_spent(tmp_path: Path) -> None:
    refs = [ref(save_random(tmp_path / str(i), [(0, "l1")], rank=2, seed=i)) for i in range(3)]
    loader = Loader(2 * load_artifact(Path(refs[0].folder)).columns.nbytes)
    for each in refs[:2]:
        loader.request(each)
        collect_all(loader)
    assert loader.get(refs[0].content_hash) is not None
    loader.request(refs[2])
    collect_all(loader)
    assert [loader.get(each.content_hash) is not None for each in refs] == [True, False, True]
    loader.close()


class Panic(BaseException):
    """Like the panics of libraries in Rust, which `except Exception` does not catch."""


@pytest.mark.parametrize("large_bytes", [0, 1 << 30])  # checked in the thread, or between steps
@pytest.mark.parametrize("step", ["read_artifact", "parse_artifact"])
@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (RecursionError("too deep"), "too deep"),
        (Panic("panicked"), "panicked"),
        (OSError(5, "Input/output error", "/data/blobs/1"), "Input/output error"),
    ],
)
def test_whatever_a_load_meets_fails_that_load_alone(
    artifacts: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    cause: BaseException,
    reason: str,
    step: str,
    large_bytes: int,
) -> None:
    monkeypatch.setattr(loader_module, "LARGE_BYTES", large_bytes)
    refs = [ref(folder) for folder in artifacts[:2]]
    loader = Loader(1 << 20)
    with monkeypatch.context() as broken:
        broken.setattr(loader_module, step, Mock(side_effect=cause))
        loader.request(refs[0])
        [failed] = collect_all(loader)
    assert failed.intervention is None
    assert failed.error == f"cannot load intervention from {artifacts[0].name}: {reason}"
    for each in refs:
        loader.request(each)
    assert all(loaded.intervention is not None for loaded in collect_all(loader))
    loader.close()


def test_an_unreadable_file_is_named_without_its_path(tmp_path: Path) -> None:
    loader = Loader(1 << 20)
    loader.request(InterventionRef(str(tmp_path / "gone"), "ab" * 32))
    [failed] = collect_all(loader)
    assert "gone: No such file" in (failed.error or "")
    assert str(tmp_path) not in (failed.error or "")
    loader.close()
