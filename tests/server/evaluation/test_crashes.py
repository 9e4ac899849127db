"""An acknowledged run survives kill -9 of the server and of the engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
from eval_data import chats, created, ended, items, started
from running_server import RunningServer, running_server

COUNT = 400


def begun(http: httpx.Client) -> dict[str, Any]:
    """Start a run, and return it when some but not all of its items are stored."""
    run = started(http, created(http, chats(COUNT), {"type": "loss"}, {"type": "f1"}), max_tokens=16)
    deadline = time.monotonic() + 60
    while not items(http, run, limit=1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run


def test_a_run_resumes_after_its_server_was_killed(tiny_llama_folder: Path, tmp_path: Path) -> None:
    first = RunningServer(tiny_llama_folder, tmp_path, "--no-worker").wait_until_ready(worker=False)
    with httpx.Client(base_url=first.url, timeout=60) as http:
        run = begun(http)
        before = items(http, run)
        first.kill()
    assert 0 < len(before) < COUNT
    with running_server(tiny_llama_folder, tmp_path, worker=False) as server, httpx.Client(base_url=server.url) as http:
        done = ended(http, {**run, "status": "in_progress"})
        after = items(http, run)
    assert done["status"] == "completed"
    assert done["result_counts"]["total"] == COUNT
    assert sum(done["result_counts"][key] for key in ("passed", "failed", "errored")) == COUNT
    assert [item["datasource_item_id"] for item in after] == list(range(COUNT))
    assert after[: len(before)] == before, "what was kept is not computed again"


def test_a_chunk_is_retried_after_the_engine_died_during_it(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, worker=False) as server, httpx.Client(base_url=server.url) as http:
        run = begun(http)
        server.child("reftserve.server.engine.process").kill()
        done = ended(http, run)
        assert done["status"] == "completed"
        assert done["result_counts"]["errored"] == 0
        assert len(items(http, run)) == COUNT
