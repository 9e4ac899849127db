"""Bodies are read and validated beside the event loop, few at a time."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from reftserve.client.schemas import ChatCompletionRequest, CompletionRequest
from reftserve.server.api import body_route
from reftserve.server.api.body_route import LARGE_BODIES, BodyRoute
from reftserve.server.api.error_responses import install_error_handlers

MEBIBYTE = 1 << 20
JSON = {"Content-Type": "application/json"}


def app() -> FastAPI:
    router = APIRouter(route_class=BodyRoute)

    @router.post("/completions")
    async def complete(body: CompletionRequest) -> int:
        return len(body.prompt)

    @router.post("/chat")
    async def chat(body: ChatCompletionRequest) -> int:
        return len(body.messages)

    found = FastAPI()
    found.include_router(router)
    install_error_handlers(found)
    return found


def client(served: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://test", timeout=60)


HOSTILE = [
    b'{"model": "a", "prompt": [' + b",".join([b"{}"] * 1_300_000) + b"]}",
    b'{"model": "a", "prompt": [' + b",".join([b"7"] * 2_000_000) + b"]}",
    json.dumps({"model": "a", "prompt": [7] * 260_000}).encode(),
    json.dumps({"model": "a", "prompt": [{}] * 16_000}).encode(),
    json.dumps({"model": "a", **{str(number): number for number in range(30_000)}}).encode(),
]


def test_the_event_loop_goes_on_while_hostile_bodies_arrive() -> None:
    async def run() -> tuple[float, set[int]]:
        longest, is_over = 0.0, False

        async def watch() -> None:
            nonlocal longest
            while not is_over:
                begun = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - begun)

        async with client(app()) as http:
            watching = asyncio.create_task(watch())
            posts = [http.post("/completions", content=body, headers=JSON) for body in HOSTILE * 6]
            answers = await asyncio.gather(*posts)
            is_over = True
            await watching
        return longest, {answer.status_code for answer in answers}

    longest, statuses = asyncio.run(run())
    assert statuses == {200, 400}
    assert longest < 0.5  # mostly other processes; one such body took 6 s before


def test_hostile_bodies_take_little_memory() -> None:
    async def run() -> None:
        async with client(app()) as http:
            await asyncio.gather(*(http.post("/completions", content=body, headers=JSON) for body in HOSTILE * 6))

    tracemalloc.start()
    asyncio.run(run())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * MEBIBYTE


def test_few_large_bodies_are_in_memory_at_once() -> None:
    begun: list[int] = []
    arrive = asyncio.Event()

    async def pieces(number: int) -> AsyncIterator[bytes]:
        begun.append(number)
        yield b'{"model": "a", '
        await arrive.wait()
        yield b'"prompt": "b"}'

    async def run() -> list[Any]:
        async with client(app()) as http:
            posts = [http.post("/completions", content=pieces(number), headers=JSON) for number in range(20)]
            waiting = asyncio.gather(*posts)
            await asyncio.sleep(0.2)
            assert len(begun) == LARGE_BODIES
            small = await http.post("/completions", json={"model": "a", "prompt": "b"})
            assert small.json() == 1
            arrive.set()
            return [answer.json() for answer in await waiting]

    assert asyncio.run(run()) == [1] * 20


def test_a_body_that_does_not_arrive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_route, "ARRIVAL_S", 0.1)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    async def run() -> httpx.Response:
        async with client(app()) as http:
            return await http.post("/completions", content=pieces(), headers=JSON)

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("size", [10, 200_000], ids=["small", "large"])
def test_wrong_bodies_are_refused_with_the_field_whatever_their_size(size: int) -> None:
    async def run(body: dict[str, Any]) -> httpx.Response:
        async with client(app()) as http:
            return await http.post("/chat", json=body)

    right = {"model": "a", "messages": [{"role": "user", "content": "x" * size}]}
    assert asyncio.run(run(right)).json() == 1
    wrong = asyncio.run(run({**right, "messages": [*right["messages"], {"role": "robot", "content": "a"}]}))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages.1.role")
