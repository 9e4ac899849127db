"""Send more requests than the server can hold: `python benchmarks/overload.py`.

Measures the capacity, then the time to the first token at 0.8 of it and at ten times as much (open loop, Poisson
arrivals), and the time that one-token chats of a second address take with and without a flood from the first.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import workload as w

sys.path.append(str(w.ROOT / "tests" / "support"))

from running_server import running_server

NEW_TOKENS = 32
PROMPTS = w.prompts(256, 59, 72)


@dataclass
class Outcomes:
    """Seconds to the first token of admitted requests, and to the answer of refused ones; tokens received."""

    first_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    tokens: int = 0


@asynccontextmanager
async def clients(url: str, address: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(local_address=address, limits=httpx.Limits(max_connections=None))
    async with httpx.AsyncClient(base_url=url, transport=transport, timeout=600) as client:
        yield client


async def ask(client: httpx.AsyncClient, number: int, outcomes: Outcomes, tokens: int = NEW_TOKENS, n: int = 1) -> None:
    body = {"model": w.MODEL.name, "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": tokens, "n": n}
    began = time.perf_counter()
    fields = {**body, "ignore_eos": True, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=fields) as response:
        if response.status_code == 429:
            await response.aread()
            outcomes.refused_s.append(time.perf_counter() - began)
            return
        response.raise_for_status()
        first = True
        async for line in response.aiter_lines():
            if first and line.startswith("data: {"):
                first = False
                outcomes.first_s.append(time.perf_counter() - began)
        outcomes.tokens += tokens * n


async def capacity(url: str, streams: int, seconds: float) -> float:
    """Return the requests per second of a closed loop of `streams` clients."""
    until, done = time.perf_counter() + seconds, 0

    async def loop(client: httpx.AsyncClient, number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await ask(client, number, Outcomes())
            number += streams
            done += time.perf_counter() < until

    async with clients(url) as client:
        await asyncio.gather(*(loop(client, number) for number in range(streams)))
    return done / seconds


async def open_loop(url: str, rate: float, seconds: float) -> tuple[Outcomes, float]:
    """Send `rate` requests per second; return the outcomes and the seconds until the last one ended."""
    outcomes, draw, tasks, began = Outcomes(), random.Random(0), [], time.perf_counter()  # noqa: S311 - a workload
    async with clients(url) as client:
        due = began
        while due < began + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, len(tasks), outcomes)))
            due += draw.expovariate(rate)
        await asyncio.gather(*tasks)
    return outcomes, time.perf_counter() - began


async def short_chats(url: str, seconds: float, flooding: int) -> list[float]:
    """Return the seconds of one-token requests while `flooding` connections of another address ask for 16 answers."""
    outcomes, flood, until = Outcomes(), Outcomes(), time.perf_counter() + seconds

    async def keep_flooding(client: httpx.AsyncClient, number: int) -> None:
        while time.perf_counter() < until:
            await ask(client, number, flood, tokens=64, n=16)
            await asyncio.sleep(0.05)

    async with clients(url) as flooder, clients(url, "127.0.0.2") as quiet:
        tasks = [asyncio.create_task(keep_flooding(flooder, number)) for number in range(flooding)]
        await asyncio.sleep(2.0)
        number = 0
        while time.perf_counter() < until:
            await ask(quiet, number, outcomes, tokens=1)
            number += 1
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes.first_s


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(url: str, seconds: float) -> None:
    await capacity(url, 64, 5)  # warm up
    rate = await capacity(url, 64, seconds / 2)
    print(f"capacity {rate:.2f} requests/s of {NEW_TOKENS} tokens", flush=True)
    for share in (0.8, 10.0):
        found, took = await open_loop(url, share * rate, seconds)
        print(
            f"{share:4} of capacity: first token p50 {statistics.median(found.first_s):.2f} s, "
            f"p99 {percentile(found.first_s, 0.99):.2f} s, admitted {len(found.first_s)}, refused "
            f"{len(found.refused_s)} (slowest {max(found.refused_s, default=0):.2f} s), "
            f"goodput / capacity {found.tokens / NEW_TOKENS / took / rate:.2f}",
            flush=True,
        )
    for flooding in (0, 12):
        found_s = await short_chats(url, seconds / 2, flooding)
        print(
            f"one token, {flooding:2} connections flooding: p50 {statistics.median(found_s):.3f} s, "
            f"p99 {percentile(found_s, 0.99):.3f} s, {len(found_s)} requests",
            flush=True,
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--max-wait-s", default="10")
    args = arguments.parse_args()
    settings = {
        "REFTSERVE_ENGINE_THREADS": "2",
        "REFTSERVE_MAX_WAIT_S": args.max_wait_s,
        "REFTSERVE_QUANTIZATION": "int8",
    }
    with (
        tempfile.TemporaryDirectory() as data,
        running_server(w.MODEL, Path(data), worker=False, env=settings) as server,
    ):
        asyncio.run(measure(server.url, args.seconds))


if __name__ == "__main__":
    main()
