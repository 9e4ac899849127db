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
from reftserve.server.services import Services
from reftserve.server.settings import Settings

logger = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
MAX_FAILED_STARTS = 8  # two minutes of growing pauses
STABLE_S = 60.0
STOP_TIMEOUT_S = 5.0
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and both under WSL


async def supervise(services: Services, on_failure: Callable[[str], None]) -> None:
    """Keep the engine, the worker and the evaluator running until cancelled.

    on_failure: takes the reason when one of them cannot be kept; then all end.
    """
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(keep_engine(services.engine, services.metrics))
            group.create_task(services.evaluator.run_forever())
            if services.settings.worker:
                group.create_task(keep_worker(services.settings, services.engine))
    except* EngineDied as died:
        on_failure(str(died.exceptions[0]))
    except* Exception as failed:
        logger.exception("a task of the server failed")
        on_failure(f"a task of the server failed: {failed.exceptions[0]}")


async def keep_engine(engine: EngineClient, metrics: Metrics) -> None:
    """Keep the engine running. Raises EngineDied when the first start fails, or MAX_FAILED_STARTS in a row."""
    failed_starts = MAX_FAILED_STARTS - 1  # a retry is useless if the first start fails: a setting is wrong

    async def once() -> None:
        nonlocal failed_starts
        try:
            ready = await engine.start()
        except EngineDied as cause:
            failed_starts += 1
            if failed_starts >= MAX_FAILED_STARTS:
                raise
            logger.error("%s", cause)
            return
        failed_starts = 0
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
        command = [sys.executable, "-P", "-m", "reftserve.server.training.worker"]
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
        except OSError:
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
