"""A real server in a separate process, for tests over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

READY_TIMEOUT_S = 120


class RunningServer:
    def __init__(self, model: Path, data: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.data = data
        self.log = data / f"serve-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "reftserve.server.commands", "serve", "--port", "0"]
        command += ["--model", str(model), "--data", str(data), *flags]
        self.process = subprocess.Popen(
            command, stdout=self.log.open("ab"), stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )

    @property
    def url(self) -> str:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            for line in reversed(self.log.read_text().splitlines()):
                if " on http://" in line:
                    return "http://" + line.split(" on http://")[1].split()[0]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no address after {READY_TIMEOUT_S} s: {self.log.read_text()}")

    def wait_until_ready(self, *, worker: bool = True) -> RunningServer:
        deadline = time.monotonic() + READY_TIMEOUT_S
        url = self.url
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                found = httpx.get(f"{url}/ready", timeout=5).json()
            except httpx.TransportError:
                found = {}
            if found.get("ready") and (found.get("worker") or not worker):
                return self
            time.sleep(0.1)
        raise AssertionError(f"not ready after {READY_TIMEOUT_S} s: {self.log.read_text()}")

    def child(self, module: str) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if any(module in word for word in child.cmdline()):
                return child
        raise AssertionError(f"no child runs {module}")

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.split("{")[0].split(" ")[0] == name:
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def stop(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"left running: {alive}"

    def kill(self) -> None:
        """Kill the server alone with SIGKILL; its children notice and exit."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(10)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"outlived the server: {alive}"


@contextmanager
def running_server(
    model: Path, data: Path, *flags: str, worker: bool = True, env: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    server = RunningServer(model, data, *flags, *([] if worker else ["--no-worker"]), env=env)
    try:
        yield server.wait_until_ready(worker=worker)
    finally:
        if server.process.poll() is None:
            server.stop()
