"""A disk without a free byte: the worker lives, and its job fails with that reason once the database can be written."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from interruptions import on_step
from workspace import Workspace

from reftserve.server.storage import outages
from reftserve.server.storage.outages import Outages
from reftserve.server.training import worker

DISK = "24m"
TIMEOUT_S = 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Take the last byte of a disk; the caller gives it back by removing the returned file."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert os.statvfs(disk).f_bavail == 0
    return filler


@contextmanager
def working(workspace: Workspace) -> Iterator[threading.Thread]:
    mine = workspace.worker()
    thread = threading.Thread(target=worker.work_forever, args=(mine.runs, mine.files, mine.leases), daemon=True)
    thread.start()
    yield thread
    mine.leases.take = _end_of_the_thread  # type: ignore[method-assign]
    thread.join(TIMEOUT_S)


def _end_of_the_thread() -> NoReturn:
    raise SystemExit


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_on_a_full_disk_fails_with_that_reason_and_its_worker_goes_on(
    tiny_llama_folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(outages, "LONGEST_PAUSE_S", 0.2)
    workspace = Workspace(tiny_llama_folder, small_disk)
    failing, following = workspace.create("failing"), workspace.create("following")
    is_full = threading.Event()
    on_step(monkeypatch, 6, lambda: is_full.is_set() or (fill(small_disk), is_full.set()))
    with caplog.at_level(logging.WARNING), working(workspace) as thread:
        wait_until(lambda: "cannot be used" in caplog.text)
        assert thread.is_alive()
        assert workspace.job(failing).status == "running", "nothing can be written yet"
        complaints = [record for record in caplog.records if "cannot be used" in record.getMessage()]
        (small_disk / "filler").unlink()
        wait_until(lambda: workspace.job(following).status == "succeeded")
    assert len(complaints) == 1, "an outage is logged once"
    error = workspace.job(failing).error
    assert error is not None
    assert (workspace.job(failing).status, error["code"]) == ("failed", "storage_full")


def test_a_worker_waits_while_a_full_disk_lets_it_take_nothing(
    tiny_llama_folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.05)
    workspace = Workspace(tiny_llama_folder, small_disk)
    job_id = workspace.create()
    fill(small_disk)
    with caplog.at_level(logging.WARNING), working(workspace) as thread:
        wait_until(lambda: "cannot be used" in caplog.text)
        assert thread.is_alive()
        (small_disk / "filler").unlink()
        wait_until(lambda: workspace.job(job_id).status == "succeeded")


def test_an_outage_is_logged_once_and_its_pauses_grow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paused: list[float] = []
    monkeypatch.setattr(outages.time, "sleep", paused.append)
    met = Outages()
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            met.wait(OSError("full"))
    assert paused == [1, 2, 4, 8, 16, 30, 30, 30]
    assert [record.getMessage() for record in caplog.records] == [
        "the database cannot be used; trying again until it can: full"
    ]
