"""Disconnecting clients, dying engines, second servers, ports in use, health and metrics."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from api_data import BASE, chat_lines
from running_server import RunningServer, running_server

LONG = {"model": BASE, "prompt": "hello", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def test_a_stream_is_cancelled_when_its_client_disconnects(server: RunningServer) -> None:
    before = server.metric("reftserve_engine_generated_tokens_total")
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True, "n": 4}) as response:
        next(response.iter_lines())
    eventually(lambda: server.metric("reftserve_engine_running") == 0)
    assert server.metric("reftserve_engine_generated_tokens_total") - before < 4 * 500


def test_a_plain_request_is_cancelled_when_its_client_disconnects(server: RunningServer) -> None:
    before = server.metric("reftserve_engine_generated_tokens_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**LONG, "n": 16}, timeout=0.3)
    eventually(lambda: server.metric("reftserve_engine_running") == 0)
    assert server.metric("reftserve_engine_generated_tokens_total") - before < 16 * 500


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_engine_and_worker_map_the_weights_from_one_file(server: RunningServer) -> None:
    (file,) = (server.data / "weights").glob("*.weights")
    for module in ("reftserve.server.engine.process", "reftserve.server.training.worker"):
        assert str(file) in Path(f"/proc/{server.child(module).pid}/maps").read_text()


def test_streams_are_server_sent_events_that_end_with_done(server: RunningServer) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 5, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert all(json.loads(line)["object"] == "text_completion" for line in data[:-1])


def test_many_requests_at_once_each_get_their_own_answer(server: RunningServer, trained: str) -> None:
    import asyncio

    async def ask_all() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:

            async def ask(index: int) -> str:
                answer = await client.completions.create(
                    model=trained if index % 2 else BASE, prompt=f"number {index}", max_tokens=12, temperature=0
                )
                return answer.choices[0].text

            together = await asyncio.gather(*(ask(i) for i in range(40)))
            return together, [await ask(i) for i in range(40)]

    together, alone = asyncio.run(ask_all())
    assert together == alone


def test_health_readiness_metrics_and_documentation_are_served(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True, "model": True, "worker": True, "database": True}
    httpx.post(f"{server.url}/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 2})
    assert server.metric("reftserve_engine_steps_total") > 0
    assert server.metric("reftserve_engine_kv_blocks_total") > 0
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/fine_tuning/jobs", "/v1/interventions"} <= paths.keys()
    page = httpx.get(f"{server.url}/docs").text
    parts = [part for part in re.findall(r'(?:src|href)="([^"]+)"', page) if part != "/docs"]
    assert parts
    assert all(part.startswith("/") for part in parts), "nothing from a content network"
    assert {httpx.get(f"{server.url}{part}").status_code for part in parts} == {200}


def test_a_dead_engine_fails_its_requests_clearly_and_is_restarted(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, worker=False) as own:
        with httpx.stream("POST", f"{own.url}/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            own.child("engine.process").kill()
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_died"
        refused = httpx.post(f"{own.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        own.wait_until_ready(worker=False)
        assert httpx.post(f"{own.url}/v1/completions", json={**LONG, "max_tokens": 3}).status_code == 200


def test_only_requests_of_the_step_that_killed_the_engine_are_not_to_be_repeated(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with (
        running_server(tiny_llama_folder, tmp_path, "--max-sequences", "1", worker=False) as own,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        httpx.post(f"{own.url}/v1/completions", json={**LONG, "max_tokens": 1})
        running = pool.submit(httpx.post, f"{own.url}/v1/completions", json=LONG, timeout=60)
        eventually(lambda: own.metric("reftserve_engine_running") == 1)
        waiting = pool.submit(httpx.post, f"{own.url}/v1/completions", json=LONG, timeout=60)
        eventually(lambda: own.metric("reftserve_engine_waiting") == 1)
        own.child("engine.process").kill()
        died, lost = running.result(), waiting.result()
    assert (died.status_code, died.headers["x-should-retry"]) == (500, "false")
    assert (lost.status_code, "x-should-retry" in lost.headers) == (503, False)
    assert {died.json()["error"]["code"], lost.json()["error"]["code"]} == {"engine_died"}


def test_a_full_queue_answers_429_with_retry_after(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, worker=False, env={"REFTSERVE_MAX_QUEUE": "2"}) as own:
        response = httpx.post(f"{own.url}/v1/completions", json={**LONG, "n": 3})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")


def test_an_upload_above_the_limit_is_413(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, worker=False, env={"REFTSERVE_MAX_FILE_BYTES": "100"}) as own:
        files = {"file": ("big.jsonl", chat_lines(10))}
        response = httpx.post(f"{own.url}/v1/files", data={"purpose": "fine-tune"}, files=files)
        assert response.status_code == 413
        assert "100 bytes" in response.json()["error"]["message"]


def serve_in_vain(*flags: str) -> str:
    command = [sys.executable, "-m", "reftserve.server.commands", "serve", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_a_second_server_on_the_same_data_folder_is_refused(server: RunningServer, tiny_llama_folder: Path) -> None:
    said = serve_in_vain("--model", str(tiny_llama_folder), "--data", str(server.data), "--port", "0")
    assert f"process {server.process.pid}" in said
    assert "--data" in said


def test_a_port_in_use_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = serve_in_vain("--model", str(tiny_llama_folder), "--data", str(tmp_path), "--port", port)
    assert f"port {port}" in said
    assert "--port" in said


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    assert "no/such-model" in serve_in_vain("--model", "no/such-model", "--data", str(tmp_path), "--port", "0")


def test_the_engine_and_the_worker_do_not_outlive_a_killed_server(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path) as own:
        own.kill()
