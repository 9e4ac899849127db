"""Bodies are read and validated beside the event loop, few at a time."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from reftserve.client.schemas import ChatCompletionRequest, CompletionRequest
from reftserve.server.api import body_route
from reftserve.server.api.body_route import LARGE_BODIES, LARGE_BODIES_OF_A_CLIENT, SMALL_BYTES, BodyRoute
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


def test_large_bodies_are_parsed_beside_the_event_loop_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    together: list[int] = []
    parse = body_route.parse_body

    def watched(body: bytes) -> Any:
        if len(body) <= SMALL_BYTES:
            return parse(body)
        threads.append(threading.get_ident())
        together.append(1)
        try:
            assert len(together) == 1
            return parse(body)
        finally:
            together.pop()

    async def run() -> set[int]:
        async with client(app()) as http:
            posts = [http.post("/completions", content=body, headers=JSON) for body in HOSTILE * 6]
            return {answer.status_code for answer in await asyncio.gather(*posts)}

    monkeypatch.setattr(body_route, "parse_body", watched)
    assert asyncio.run(run()) == {200, 400}
    assert len(threads) == sum(len(body) > SMALL_BYTES for body in HOSTILE) * 6
    assert threading.get_ident() not in threads


def test_hostile_bodies_take_little_memory() -> None:
    async def run() -> None:
        async with client(app()) as http:
            await asyncio.gather(*(http.post("/completions", content=body, headers=JSON) for body in HOSTILE * 6))

    tracemalloc.start()
    asyncio.run(run())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * MEBIBYTE


def of_address(served: FastAPI, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(served, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)


class SlowBodies:
    """Bodies whose first piece is there at once, and the rest when `arrive` is set."""

    def __init__(self, first_bytes: int) -> None:
        self.begun = asyncio.Semaphore(0)
        self.asked = 0
        self.arrive = asyncio.Event()
        self._first = b'{"model": "a", ' + b" " * first_bytes

    async def pieces(self) -> AsyncIterator[bytes]:
        yield self._first
        self.asked += 1
        self.begun.release()
        await self.arrive.wait()
        yield b'"prompt": "b"}'

    async def post(self, served: FastAPI, address: str) -> httpx.Response:
        async with of_address(served, address) as http:
            return await http.post("/completions", content=self.pieces(), headers=JSON)


def test_few_large_bodies_are_in_memory_at_once_and_fewer_of_one_client() -> None:
    async def run() -> list[Any]:
        served, bodies = app(), SlowBodies(SMALL_BYTES)
        of_one = asyncio.gather(*(bodies.post(served, "10.0.0.1") for _ in range(20)))
        for _ in range(LARGE_BODIES_OF_A_CLIENT):
            await bodies.begun.acquire()
        of_others = asyncio.gather(*(bodies.post(served, f"10.0.0.{number}") for number in range(2, 22)))
        for _ in range(LARGE_BODIES - LARGE_BODIES_OF_A_CLIENT):
            await bodies.begun.acquire()
        async with client(served) as http:
            assert (await http.post("/completions", json={"model": "a", "prompt": "b"})).json() == 1
        assert bodies.asked == LARGE_BODIES
        bodies.arrive.set()
        return [answer.json() for answer in [*await of_one, *await of_others]]

    assert asyncio.run(run()) == [1] * 40


def test_bodies_of_unknown_size_take_no_place_before_they_are_large() -> None:
    async def run() -> None:
        served, bodies = app(), SlowBodies(10)
        waiting = asyncio.gather(*(bodies.post(served, "10.0.0.1") for _ in range(20)))
        for _ in range(20):
            await bodies.begun.acquire()
        async with of_address(served, "10.0.0.1") as http:
            large = {"model": "a", "prompt": "b" * 2 * SMALL_BYTES}
            assert (await http.post("/completions", json=large)).status_code == 200
        bodies.arrive.set()
        await waiting

    asyncio.run(run())


def test_a_large_body_that_finds_no_place_is_sent_away_with_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_route, "PLACE_S", 0.1)

    async def run() -> httpx.Response:
        served, bodies = app(), SlowBodies(SMALL_BYTES)
        waiting = asyncio.gather(*(bodies.post(served, "10.0.0.1") for _ in range(LARGE_BODIES_OF_A_CLIENT)))
        for _ in range(LARGE_BODIES_OF_A_CLIENT):
            await bodies.begun.acquire()
        late = await bodies.post(served, "10.0.0.1")
        bodies.arrive.set()
        assert {answer.status_code for answer in await waiting} == {200}
        assert (await bodies.post(served, "10.0.0.1")).status_code == 200
        return late

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) > 0


def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_server() -> None:
    async def run() -> int:
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/completions", "query_string": b"", "client": ("h", 1)}
        await app()({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(run()) == 499


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
