"""Data sets and runs for tests of evals over HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
from api_data import BASE


def chats(count: int, question: str = "say") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{question} {'yes' if number % 2 else 'no'} {number}"},
                {"role": "assistant", "content": "yes" if number % 2 else "no"},
            ]
        }
        for number in range(count)
    ]


def upload(http: httpx.Client, rows: list[dict[str, Any]]) -> str:
    content = "\n".join(map(json.dumps, rows)).encode()
    response = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("set.jsonl", content)})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def created(http: httpx.Client, rows: list[dict[str, Any]], *criteria: dict[str, Any]) -> str:
    source = {"type": "file", "file_id": upload(http, rows)}
    response = http.post("/v1/evals", json={"data_source_config": source, "testing_criteria": criteria})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def started(http: httpx.Client, eval_id: str, *, max_tokens: int = 8, **source: Any) -> dict[str, Any]:
    sampling = {"max_completion_tokens": max_tokens}
    body = {"data_source": {"type": "completions", "model": BASE, "sampling_params": sampling, **source}}
    response = http.post(f"/v1/evals/{eval_id}/runs", json=body)
    assert response.status_code == 200, response.text
    run: dict[str, Any] = response.json()
    return run


def ended(http: httpx.Client, run: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while run["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, run
        time.sleep(0.1)
        run = http.get(f"/v1/evals/{run['eval_id']}/runs/{run['id']}").json()
    return run


def items(http: httpx.Client, run: dict[str, Any], **params: Any) -> list[dict[str, Any]]:
    path = f"/v1/evals/{run['eval_id']}/runs/{run['id']}/output_items"
    found: list[dict[str, Any]] = http.get(path, params={"limit": 1000, **params}).json()["data"]
    return found


def scores(run: dict[str, Any]) -> dict[str, float]:
    return {result["testing_criteria"]: result["score"] for result in run["per_testing_criteria_results"]}
