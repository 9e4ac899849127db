"""Restarts the engine and the worker when they end, after growing pauses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from reftserve.server.engine.engine_errors import EngineDied
from reftserve.server.inference.engine_client import EngineClient
from reftserve.server.inference.metrics import Metrics
from reftserve.server.settings import Settings

logger = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STABLE_S = 60.0
STOP_TIMEOUT_S = 5.0
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and both under WSL


async def keep_engine(engine: EngineClient, metrics: Metrics, on_failure: Callable[[str], None]) -> None:
    """Keep the engine running. on_failure: takes the reason if the first start fails, when a retry would be useless."""
    first = True

    async def once() -> None:
        nonlocal first
        try:
            ready = await engine.start()
        except EngineDied as cause:
            if first:
                on_failure(str(cause))
                raise asyncio.CancelledError from cause
            logger.error("%s", cause)
            return
        first = False
        metrics.engine_starts.inc()
        logger.info("engine ready: %s, %s, context of %d tokens", ready.device, ready.dtype, ready.max_context)
        code = await engine.wait()
        logger.error("the engine ended with code %d", code)

    await _restart_forever(once)


async def keep_worker(settings: Settings, engine: EngineClient) -> None:
    """Keep the training worker running. Its standard input gets two lines of JSON: settings and lent weights.

    On a GPU the worker borrows the engine's weights, so it starts after the engine and ends with it. On the CPU both
    load at the same time; the locks of the compiled kernels and of the weights file order their work.
    """

    async def once() -> None:
        lent = (await engine.until_ready()).lent if may_be_on_gpu(settings) else []
        # Wait for the end of this engine, not of its successor, which may run before the worker does.
        ends = [asyncio.ensure_future(engine.ended())] if lent else []
        command = [sys.executable, "-m", "reftserve.server.training.worker"]
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        ends.append(asyncio.create_task(process.wait()))
        try:
            assert process.stdin is not None  # noqa: S101 - the line above requested it
            process.stdin.write(settings.model_dump_json().encode() + b"\n" + msgspec.json.encode(lent) + b"\n")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the worker has ended
                await process.stdin.drain()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if ends[-1].done():
                logger.error("the worker ended with code %d", process.returncode)
            else:
                logger.warning("stopping the worker, because the engine whose weights it borrowed has ended")
        finally:
            for end in ends:
                end.cancel()
            if process.returncode is None:
                await _end(process)

    await _restart_forever(once)


def may_be_on_gpu(settings: Settings) -> bool:
    """Return whether the engine may compute on a GPU, judged by the setting and by the drivers' device files.

    Only torch would know, and this process does not load it. Without a GPU the worker then waits and borrows nothing.
    """
    if settings.device == "auto":
        return any(Path(driver).exists() for driver in GPU_DRIVERS)
    return not settings.device.startswith("cpu")


async def _restart_forever(once: Callable[[], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    pause_s = FIRST_PAUSE_S
    while True:
        began = loop.time()
        try:
            await once()
        except Exception:
            # No process, no memory, no room on the disk: the next try may find some.
            logger.exception("a child process could not be started")
        pause_s = FIRST_PAUSE_S if loop.time() - began > STABLE_S else min(2 * pause_s, LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


async def _end(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    if process.returncode is None:
        process.kill()
        await process.wait()
