"""Servers and workers to kill. They start fast, forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

from reftserve.server.settings import Settings

ANSWER_TIMEOUT_S = 60
STORE_DELAY_S = 0.5
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["reftserve.server.main", "reftserve.server.training.worker"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve(settings: Settings, log: Path) -> None:
    _write_to(log)
    from reftserve.server.main import serve as run

    run(settings)


def work(settings: Settings, log: Path) -> None:
    _write_to(log)
    from reftserve.server.training.worker import run

    run(settings)


def serve_slowly(settings: Settings, log: Path) -> None:
    _slow_down_the_store()
    serve(settings, log)


def work_slowly(settings: Settings, log: Path) -> None:
    _slow_down_the_store()
    work(settings, log)


def _slow_down_the_store() -> None:
    from reftserve.server.storage.blobs import BlobStore

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(*arguments: Any, **named: Any) -> Any:
            time.sleep(STORE_DELAY_S)
            return call(*arguments, **named)

        return delayed

    for name in ("put_file", "put_folder", "local_file", "local_folder", "exists", "delete"):
        setattr(BlobStore, name, slow(getattr(BlobStore, name)))


def _write_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)


class Victim:
    def __init__(self, target: Callable[[Settings, Path], None], settings: Settings, log: Path) -> None:
        self._target = target
        self._settings = settings
        self.log = log
        self.process = self._start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def restart(self) -> None:
        self.process = self._start()

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(30)
        assert not self.process.is_alive(), self.log.read_text()

    def _start(self) -> BaseProcess:
        process = PROCESSES.Process(target=self._target, args=(self._settings, self.log), daemon=True)
        process.start()
        return process


def wait_for_answer(url: str) -> None:
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"no answer from {url} after {ANSWER_TIMEOUT_S} s")
