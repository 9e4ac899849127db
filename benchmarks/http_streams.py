"""The server with 64 streams over HTTP beside the engine alone: `python benchmarks/http_streams.py`."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time

import httpx
import torch
import workload as w

STREAMS, NEW_TOKENS = 64, 64


async def stream(client: httpx.AsyncClient, prompt: list[int]) -> None:
    """Read one stream to its end."""
    body = {"model": w.MODEL.name, "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for _ in response.aiter_raw():
            pass


async def _all(url: str, prompts: list[list[int]]) -> None:
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        await asyncio.gather(*(stream(client, prompt) for prompt in prompts))


def over_http(url: str, prompts: list[list[int]]) -> float:
    """Generated tokens a second."""
    began = time.perf_counter()
    asyncio.run(_all(url, prompts))
    return len(prompts) * NEW_TOKENS / (time.perf_counter() - began)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    runs = arguments.parse_args().runs
    torch.set_num_threads(2)
    prompts = w.prompts(STREAMS, 59, 72)
    engine = w.make_engine(prefix_cache=False)
    with socket.socket() as free, tempfile.TemporaryDirectory() as data:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "reftserve.client.cli", "serve", "--model", str(w.MODEL), "--port", str(port)]
        environment = {
            **os.environ,
            "REFTSERVE_DATA": data,
            "REFTSERVE_WORKER": "false",
            "REFTSERVE_PREFIX_CACHE": "false",
            "REFTSERVE_ENGINE_THREADS": "2",
        }
        server = subprocess.Popen(command, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            while server.poll() is None:
                try:
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            figures = w.medians(
                {
                    "engine alone": lambda: w.serve(engine, prompts, NEW_TOKENS, []),
                    "over HTTP": lambda: over_http(url, prompts),
                },
                runs,
            )
        finally:
            server.terminate()
            server.wait()
    print(f"{STREAMS} streams of {NEW_TOKENS} tokens; {w.machine()}; median of {runs}")
    for name, figure in figures.items():
        print(f"{name:14} {figure:7.1f} tokens/s")
    print(f"over HTTP / engine alone = {figures['over HTTP'] / figures['engine alone']:.3f}")
    engine.close()


if __name__ == "__main__":
    main()
