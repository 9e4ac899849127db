"""What hostile requests cost everybody else: the worst gaps of 8 streams and of /health, with and without them.

    python benchmarks/hostile.py [--only bodies] [model folder]

Streams eight answers and asks for /health all the time: first alone, then while 200 hostile bodies and files arrive, 8
at a time. Prints the worst gap between two tokens of a stream, the slowest /health, and the growth of the server's
memory. Goal: 100 ms and 300 MB more.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

from running_server import running_server

STREAMS = 8
HOSTILE = 200
AT_ONCE = 8
ALONE_S = 15.0
MEBIBYTE = 1 << 20


@dataclass
class Gaps:
    """Seconds. stream: between two pieces of one answer; health: to an answer of /health."""

    stream: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


def hostile_requests(model: str, only: str) -> list[dict[str, Any]]:
    """Return requests as httpx takes them; most are near the largest size that is read. only: bodies, files or all."""

    def body(path: str, content: bytes, **headers: str) -> dict[str, Any]:
        return {"url": path, "content": content, "headers": {"Content-Type": "application/json", **headers}}

    def many(prefix: str, item: str) -> bytes:
        return (prefix + ",".join([item] * (4 * MEBIBYTE // (len(item) + 2))) + "]}").encode()

    def upload(content: bytes) -> dict[str, Any]:
        return {"url": "/v1/files", "data": {"purpose": "fine-tune"}, "files": {"file": ("set.jsonl", content)}}

    start = f'{{"model": "{model}", '
    text = "The quick brown fox. " * (3 * MEBIBYTE // 21)
    rows = b'{"messages": [' + b",".join([b"{}"] * 300_000) + b"]}"
    bodies = [
        body("/v1/completions", many(start + '"prompt": [', "{}")),
        body("/v1/completions", many(start + '"prompt": [', "[0]")),
        body("/v1/completions", many(start + '"prompt": [', "7")),
        body("/v1/completions", json.dumps({"model": model, "prompt": [7] * 200_000}).encode()),
        body("/v1/completions", json.dumps({"model": model, "prompt": text}).encode()),
        body("/v1/chat/completions", many(start + '"messages": [', "{}")),
        body("/v1/chat/completions", many(start + '"messages": [', '{"role": "user", "content": "a"}')),
        body("/v1/chat/completions", b"[" * 4 * MEBIBYTE),
        body("/v1/chat/completions", gzip.compress(b" " * 256 * MEBIBYTE), **{"Content-Encoding": "gzip"}),
        body("/v1/chat/completions", b'{"' + b'\\"' * 2 * MEBIBYTE),
        body("/v1/classify", many(start + '"labels": [', '"a"')),
        body("/v1/evals", many('{"testing_criteria": [', '{"type": "loss"}')),
    ]
    files = [
        upload(rows),
        upload(b'{"prompt": "a", "completion": ""}\n' * 50_000),
        upload(b"," * 100_000 + b"\n" + b"," * 100_000),
        upload(b"\xff" * 4 * MEBIBYTE),
    ]
    return {"bodies": bodies, "files": files, "all": bodies + files}[only]


async def stream_answers(http: httpx.AsyncClient, model: str, gaps: Gaps, is_over: asyncio.Event) -> None:
    """Stream one answer after the other and note the gaps between pieces."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True}
    while not is_over.is_set():
        async with http.stream("POST", "/v1/completions", json=body) as response:
            last = None
            async for _ in response.aiter_bytes():
                now = time.perf_counter()
                if last is not None:
                    gaps.stream.append(now - last)
                last = now


async def ask_for_health(http: httpx.AsyncClient, gaps: Gaps, is_over: asyncio.Event) -> None:
    """Ask for /health every 10 ms."""
    while not is_over.is_set():
        begun = time.perf_counter()
        (await http.get("/health")).raise_for_status()
        gaps.health.append(time.perf_counter() - begun)
        await asyncio.sleep(0.01)


async def send_hostile(http: httpx.AsyncClient, model: str, only: str) -> Counter[int]:
    """Send the hostile requests and count their statuses."""
    kinds, answers = hostile_requests(model, only), Counter[int]()
    left = iter(range(HOSTILE))

    async def sender() -> None:
        for number in left:
            answers[(await http.post(**kinds[number % len(kinds)])).status_code] += 1

    await asyncio.gather(*(sender() for _ in range(AT_ONCE)))
    return answers


async def measure(url: str, model: str, only: str, process: psutil.Process) -> None:
    """Print the table."""
    # Another process sends the hostile requests, so that making them holds up no reader.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        await asyncio.wrap_future(pool.submit(hostile_requests, model, only))  # it has started
        await measure_with(pool, url, model, only, process)


async def measure_with(pool: ProcessPoolExecutor, url: str, model: str, only: str, process: psutil.Process) -> None:
    """Print a line without and a line with hostile requests."""
    timeout, limits = httpx.Timeout(300), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as http:
        for name in ("alone", "hostile"):
            gaps, is_over, most = Gaps(), asyncio.Event(), 0
            before = process.memory_info().rss
            readers = [asyncio.create_task(stream_answers(http, model, gaps, is_over)) for _ in range(STREAMS)]
            readers.append(asyncio.create_task(ask_for_health(http, gaps, is_over)))
            begun = time.perf_counter()
            if name == "alone":
                await asyncio.sleep(ALONE_S)
                outcome = ""
            else:
                sending = asyncio.wrap_future(pool.submit(send_all, url, model, only))
                while not sending.done():
                    most = max(most, process.memory_info().rss - before)
                    await asyncio.sleep(0.05)
                outcome = f"  statuses {dict(sorted((await sending).items()))}"
            seconds = time.perf_counter() - begun
            is_over.set()
            await asyncio.gather(*readers)
            print(
                f"{name:8} {seconds:5.1f} s  worst gap of a stream {max(gaps.stream) * 1e3:5.0f} ms  "
                f"slowest /health {max(gaps.health) * 1e3:5.0f} ms  memory +{most / 1e6:4.0f} MB{outcome}",
                flush=True,
            )


def send_all(url: str, model: str, only: str) -> Counter[int]:
    """Send the hostile requests from this process."""

    async def run() -> Counter[int]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            return await send_hostile(http, model, only)

    return asyncio.run(run())


def main() -> None:
    """Start a server and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        default=Path("reftserve-data/models/HuggingFaceTB--SmolLM2-135M-Instruct"),
    )
    parser.add_argument("--only", choices=["bodies", "files", "all"], default="all")
    given = parser.parse_args()
    model: Path = given.model
    with tempfile.TemporaryDirectory() as folder, running_server(model, Path(folder), worker=False) as server:
        asyncio.run(measure(server.url, model.name, given.only, psutil.Process(server.process.pid)))


if __name__ == "__main__":
    main()
