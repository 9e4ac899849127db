"""Server and workers run apart: `reftserve serve --no-worker`, and `reftserve worker` on the same data folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from api_data import BASE, chat_lines, finished
from running_server import running_server

NICENESS = 7


def test_separate_workers_share_the_jobs_of_a_server_without_a_worker(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFTSERVE_WORKER_NICENESS", str(NICENESS))
    command = [sys.executable, "-m", "reftserve.server.commands", "worker"]
    command += ["--model", str(tiny_llama_folder), "--data", str(tmp_path)]
    with running_server(tiny_llama_folder, tmp_path, worker=False) as server:
        assert httpx.get(f"{server.url}/ready").json()["worker"] is False
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
        file = client.files.create(file=("set.jsonl", chat_lines(24)), purpose="fine-tune")

        def create() -> str:
            method = {"type": "reft", "reft": {"hyperparameters": {"n_epochs": 2}}}
            job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix="apart", method=method)  # type: ignore[arg-type]
            return job.id

        waits = create()
        time.sleep(1)
        assert client.fine_tuning.jobs.retrieve(waits).status == "validating_files"
        with ExitStack() as stack:
            workers = [stack.enter_context(running(command)) for _ in range(2)]
            done = [finished(client, job_id).fine_tuned_model for job_id in [waits, *(create() for _ in range(5))]]
            assert sorted(name or "" for name in done) == [f"apart@{number}" for number in range(1, 7)]
            assert httpx.get(f"{server.url}/ready").json()["worker"] is True
            assert [worker.poll() for worker in workers] == [None, None]
            given = os.getpriority(os.PRIO_PROCESS, 0)
            assert {os.getpriority(os.PRIO_PROCESS, worker.pid) for worker in workers} == {min(19, given + NICENESS)}


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        try:
            yield worker
        finally:
            worker.terminate()
            assert worker.wait(30) == 0
