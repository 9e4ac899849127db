"""Compare the server with 64 streams over HTTP to the engine alone: `python benchmarks/http_streams.py`. Both and the
client share the cores, so it also prints the processor time per token outside the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import workload as w

sys.path.append(str(w.ROOT / "tests" / "support"))

from running_server import RunningServer, running_server

STREAMS, NEW_TOKENS = 64, 64


async def stream(port: int, prompt: list[int]) -> None:
    fields = {"model": w.MODEL.name, "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
    body = json.dumps({**fields, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
    assert b"data: [DONE]" in answer, answer[-500:]


async def _all(port: int, prompts: list[list[int]]) -> None:
    await asyncio.gather(*(stream(port, prompt) for prompt in prompts))


def over_http(server: RunningServer, prompts: list[list[int]]) -> float:
    port = int(server.url.rsplit(":", 1)[1])
    began = time.perf_counter()
    asyncio.run(_all(port, prompts))
    return len(prompts) * NEW_TOKENS / (time.perf_counter() - began)


@contextmanager
def counted(seconds: dict[str, float], processes: dict[str, psutil.Process]) -> Iterator[None]:
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    yield
    for name, process in processes.items():
        seconds[name] = seconds.get(name, 0.0) + sum(process.cpu_times()[:2]) - before[name]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--quantization", choices=["none", "int8"], default="none")
    args = arguments.parse_args()
    torch.set_num_threads(2)
    prompts = w.prompts(STREAMS, 59, 72)
    engine = w.make_engine(prefix_cache=False, quantization=args.quantization)
    settings = {
        "REFTSERVE_PREFIX_CACHE": "false",
        "REFTSERVE_ENGINE_THREADS": "2",
        "REFTSERVE_QUANTIZATION": args.quantization,
    }
    seconds: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as data,
        running_server(w.MODEL, Path(data), worker=False, env=settings) as server,
    ):
        processes = {"HTTP process": psutil.Process(server.process.pid), "client": psutil.Process()}

        def served() -> float:
            with counted(seconds, processes):
                return over_http(server, prompts)

        figures = w.medians(
            {"engine alone": lambda: w.serve(engine, prompts, NEW_TOKENS, []), "over HTTP": served}, args.runs
        )
    engine.close()
    print(f"{STREAMS} streams of {NEW_TOKENS} tokens; {w.machine()}; median of {args.runs}")
    for name, figure in figures.items():
        print(f"{name:14} {figure:7.1f} tokens/s")
    tokens = STREAMS * NEW_TOKENS * (args.runs + 1)
    for name, used in seconds.items():
        print(f"{name:14} {1e6 * used / tokens:7.1f} us of processor time a token")
    print(f"over HTTP / engine alone = {figures['over HTTP'] / figures['engine alone']:.3f}")


if __name__ == "__main__":
    main()
