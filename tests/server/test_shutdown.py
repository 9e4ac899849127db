"""SIGTERM: answers may end within the grace time, then streams end with an error, and nothing is left running."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
from api_data import BASE, chat_lines
from running_server import RunningServer, running_server

LONG = {"model": BASE, "prompt": "hello", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
PATIENT = ("--shutdown-grace-s", "100")


def events(response: httpx.Response, own: RunningServer) -> list[Any]:
    """Stop the server after the first event; return all events of the stream."""
    found = []
    for line in response.iter_lines():
        if line.startswith("data: "):
            if not found:
                own.process.send_signal(signal.SIGTERM)
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def test_a_stream_ends_in_order_after_sigterm(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, *PATIENT, worker=False) as own:
        with httpx.stream("POST", f"{own.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
            found = events(response, own)
        assert found[-1] == "[DONE]"
        assert found[-2]["choices"][0]["finish_reason"] == "length"
        assert own.process.wait(30) == 0


def test_after_the_grace_time_a_stream_ends_with_an_error_event(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, "--shutdown-grace-s", "0", worker=False) as own:
        with httpx.stream("POST", f"{own.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
            found = events(response, own)
        assert found[-1] == "[DONE]"
        assert found[-2]["error"]["code"] == "server_stopping"
        own.process.wait(30)


def test_while_answers_end_new_requests_are_refused_and_the_server_is_not_ready(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with (
        running_server(tiny_llama_folder, tmp_path, *PATIENT, worker=False) as own,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        httpx.post(f"{own.url}/v1/completions", json={**LONG, "max_tokens": 1})
        first = pool.submit(httpx.post, f"{own.url}/v1/completions", json={**LONG, "n": 8}, timeout=60)
        while own.metric("reftserve_engine_running") == 0:
            time.sleep(0.02)
        own.process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{own.url}/ready")).json()["model"]:
            time.sleep(0.02)
        assert ready.status_code == 503
        refused = httpx.post(f"{own.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
        assert first.result().status_code == 200
        own.process.wait(30)


def test_a_stream_of_a_jobs_events_ends_with_an_error_event(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, worker=False) as own:
        client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="any")
        file = client.files.create(file=("data.jsonl", chat_lines(24)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix="waits")
        address = f"{own.url}/v1/fine_tuning/jobs/{job.id}/events?stream=true"
        with httpx.stream("GET", address, timeout=60) as response:
            found = events(response, own)
        assert found[-2]["error"]["code"] == "server_stopping"
        own.process.wait(30)
