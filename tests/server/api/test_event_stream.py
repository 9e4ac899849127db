"""A job's events as a server-sent stream: complete, in order, resumable, shared by all watchers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jobs_api import JobsApi, jobs_api, step
from openai._streaming import SSEDecoder

from reftserve.server.api import sse
from reftserve.server.training.event_feed import PAGE, POLL_S, EventFeed


@pytest.fixture(scope="module")
def api(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsApi]:
    with jobs_api(tiny_llama_folder, tmp_path_factory.mktemp("jobs")) as api:
        yield api


def path(api: JobsApi, job_id: str) -> str:
    return f"{api.url}/v1/fine_tuning/jobs/{job_id}/events"


def whole(api: JobsApi, job_id: str, **arguments: Any) -> tuple[list[dict[str, Any]], list[str]]:
    response = httpx.get(path(api, job_id), timeout=20, **{"params": {"stream": "true"}, **arguments})
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    ids = [line.removeprefix("id: ") for line in response.text.splitlines() if line.startswith("id: ")]
    return [json.loads(line) for line in data], ids


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [int(event["id"].rsplit("-", 1)[1]) for event in events]


def test_a_stream_gives_past_then_live_events_and_ends_with_the_job(api: JobsApi) -> None:
    job = api.add_job()
    api.add_events(job, "Training", step(1))
    with httpx.stream("GET", path(api, job), params={"stream": "true"}, timeout=20) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        past = [json.loads(next(lines)[6:]) for _ in range(3)]
        assert [event["type"] for event in past] == ["message", "message", "metrics"]
        assert past[2]["data"] == step(1)
        api.add_events(job, step(2, valid_loss=0.5))
        assert json.loads(next(lines)[6:])["data"]["valid_loss"] == 0.5
        api.add_events(job, "Published tone@1", status="succeeded")
        assert json.loads(next(lines)[6:])["message"] == "Published tone@1"
        assert [*lines] == ["data: [DONE]"]
    events, ids = whole(api, job)
    assert ids == [event["id"] for event in events]
    assert events == httpx.get(path(api, job)).json()["data"][::-1], "the objects of the list"


def test_the_accept_header_requests_a_stream_and_the_stream_field_overrides_it(api: JobsApi) -> None:
    job = api.add_job()
    api.add_events(job, "Cancelled", status="cancelled")
    accept = {"Accept": "text/event-stream"}
    assert numbers(whole(api, job, params={}, headers=accept)[0]) == [1, 2]
    assert httpx.get(path(api, job), params={"stream": "false"}, headers=accept).json()["object"] == "list"


@pytest.fixture(scope="module")
def long_job(api: JobsApi) -> str:
    """A job that ended after 1250 events, more than the shared buffer holds."""
    job = api.add_job()
    api.add_events(job, *(step(number, 1248) for number in range(1, 1249)))
    api.add_events(job, "Published", status="succeeded")
    return job


@pytest.mark.parametrize("seen", [1, 199, 200, 201, 999, 1249, 1250])
def test_a_stream_resumes_after_the_last_event_seen(api: JobsApi, long_job: str, seen: int) -> None:
    ids = whole(api, long_job)[1]
    assert len(ids) == 1250
    assert whole(api, long_job, params={"stream": "true", "after": ids[seen - 1]})[1] == ids[seen:]
    # A reconnecting browser keeps the URL and adds the header.
    again = {"params": {"stream": "true", "after": ids[0]}, "headers": {"Last-Event-ID": ids[seen - 1]}}
    assert whole(api, long_job, **again)[1] == ids[seen:]


def test_a_job_of_another_owner_is_not_found(api: JobsApi) -> None:
    job = api.add_job(owner="somebody")
    api.add_events(job, "Failed", status="failed")
    for found in (job, "ftjob-none"):
        response = httpx.get(path(api, found), params={"stream": "true"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")
    assert numbers(whole(api, job, headers={"X-Owner": "somebody"})[0]) == [1, 2]


def test_an_event_id_of_another_job_is_refused_before_the_stream_begins(api: JobsApi) -> None:
    job, other = api.add_job(), api.add_job()
    own = f"ftevent-{job.removeprefix('ftjob-')}"
    for wrong in ("7", "ftevent-7", f"{own}-2", f"{own}-x", f"{own}-{'9' * 30}", f"ftevent-{other[6:]}-1"):
        for arguments in ({"headers": {"Last-Event-ID": wrong}}, {"params": {"stream": "true", "after": wrong}}):
            response = httpx.get(path(api, job), **{"params": {"stream": "true"}, **arguments})  # type: ignore[arg-type]
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "after")
            assert repr(wrong) in error["message"]


def test_a_non_finite_loss_is_null_in_stream_and_list(api: JobsApi) -> None:
    job = api.add_job()
    api.add_events(job, {**step(1), "train_loss": float("nan")})
    api.add_events(job, "Failed", status="failed")
    streamed = next(event for event in whole(api, job)[0] if event["data"])
    assert streamed["data"]["train_loss"] is None
    assert streamed in httpx.get(path(api, job)).json()["data"]


def test_comments_keep_a_quiet_stream_open(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.1)
    with httpx.stream("GET", path(api, api.add_job()), params={"stream": "true"}, timeout=5) as response:
        assert next(line for line in response.iter_lines() if line.startswith(":"))


def test_comments_are_no_events_to_openais_decoder(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    job = api.add_job()
    api.add_events(job, step(1))  # its id would make OpenAI's decoder yield an event at each blank line
    with httpx.stream("GET", path(api, job), params={"stream": "true"}, timeout=5) as response:
        received = b""
        for piece in response.iter_bytes():
            received += piece
            if received.count(b": keep-alive") > 3:
                break
    assert all(event.data for event in SSEDecoder().iter_bytes(iter([received])))


def test_the_server_stops_polling_for_a_disconnected_watcher(api: JobsApi) -> None:
    with httpx.stream("GET", path(api, api.add_job()), params={"stream": "true"}, timeout=5) as response:
        lines = response.iter_lines()
        next(lines)
        before = api.reads
        time.sleep(4 * POLL_S)
        assert api.reads > before
    time.sleep(2 * POLL_S)
    before = api.reads
    time.sleep(4 * POLL_S)
    assert api.reads == before


def test_many_watchers_each_get_every_event_once_at_the_cost_of_one(api: JobsApi) -> None:
    job, steps, watchers = api.add_job(), 2400, 30

    def work() -> None:
        for first in range(1, steps, 300):
            api.add_events(job, *(step(first + i, steps) for i in range(300)))
            time.sleep(POLL_S / 2)
        api.add_events(job, "Published", status="succeeded")

    async def watch_all() -> list[list[int]]:
        feed = EventFeed(api.database)

        async def watch(index: int) -> list[int]:
            numbers = []
            async for event in feed.follow(job, index % 2):
                numbers.append(event.number)
                # One watcher reads slowly and falls behind the shared buffer.
                await asyncio.sleep(0.1 if index == 0 and event.number % 100 == 0 else 0)
            return numbers

        return await asyncio.gather(*(watch(index) for index in range(watchers)))

    worker = threading.Thread(target=work)
    began, before = time.monotonic(), api.reads
    worker.start()
    seen = asyncio.run(watch_all())
    worker.join()
    last = 1 + steps + 1
    assert seen == [list(range(index % 2 + 1, last + 1)) for index in range(watchers)]
    looks = (time.monotonic() - began) / POLL_S
    pages = steps / PAGE
    assert api.reads - before < looks + 2 * pages + 10, "not once a watcher"
