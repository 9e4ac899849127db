"""The worker's process: on a GPU it starts when the engine is there, and what it has borrowed ends with the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import psutil
import pytest

from reftserve.server import supervisor
from reftserve.server.base.lent_tensor import LentTensor
from reftserve.server.engine.messages import Ready
from reftserve.server.inference.engine_client import EngineClient
from reftserve.server.settings import Settings
from reftserve.server.supervisor import FIRST_PAUSE_S, keep_worker, may_be_on_gpu

LENT = LentTensor("float32", (1,), (1,), 0, 0, b"handle", 4, 0, b"", 0, b"", False)


class Engine:
    """An engine that comes and goes as the test says. `lent` is not opened: the worker computes on the CPU."""

    def __init__(self, lent: list[LentTensor]) -> None:
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self._lent = lent

    async def until_ready(self) -> Ready:
        await self.ready.wait()
        return Ready(max_context=8, device="cpu", dtype="float32", lent=self._lent)

    async def ended(self) -> int:
        await self.gone.wait()
        return 0


@asynccontextmanager
async def kept(engine: Engine, model: Path, data: Path) -> AsyncIterator[None]:
    settings = Settings(model=str(model), data=data, device="cpu", cpu_kernels="never", worker_threads=1)
    keeper = asyncio.create_task(keep_worker(settings, cast("EngineClient", engine)))
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
    assert workers() == []


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends
            if "reftserve.server.training.worker" in child.cmdline():
                found.append(child)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("lent", [[], [LENT]], ids=["nothing is lent", "weights are lent"])
def test_where_a_gpu_may_be_a_worker_starts_with_the_engine_and_ends_with_what_it_lends(
    lent: list[LentTensor], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "may_be_on_gpu", lambda settings: True)

    async def story() -> None:
        engine = Engine(lent)
        async with kept(engine, tiny_llama_folder, tmp_path):
            await asyncio.sleep(0.2)
            assert workers() == []
            engine.ready.set()
            await until(lambda: (tmp_path / "worker.heartbeat").exists())
            (worker,) = workers()
            engine.ready.clear()
            engine.gone.set()
            if not lent:
                await asyncio.sleep(0.5)
                assert workers() == [worker]
                return
            await until(lambda: workers() == [])
            await asyncio.sleep(FIRST_PAUSE_S + 0.5)
            assert workers() == []
            engine.gone.clear()
            engine.ready.set()
            await until(lambda: len(workers()) == 1)

    asyncio.run(story())


def test_on_the_cpu_a_worker_loads_beside_the_engine(tiny_llama_folder: Path, tmp_path: Path) -> None:
    async def story() -> None:
        engine = Engine([])
        async with kept(engine, tiny_llama_folder, tmp_path):
            await until(lambda: (tmp_path / "worker.heartbeat").exists())
            assert not engine.ready.is_set()

    asyncio.run(story())


@pytest.mark.parametrize("driver", [True, False], ids=["a driver", "no driver"])
def test_a_gpu_is_expected_where_it_is_asked_for_or_a_driver_is_there(
    driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver:
        (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(supervisor, "GPU_DRIVERS", (str(tmp_path / "nvidiactl"),))
    asked = {device: may_be_on_gpu(Settings(device=device)) for device in ("auto", "cpu", "cuda", "cuda:1")}
    assert asked == {"auto": driver, "cpu": False, "cuda": True, "cuda:1": True}
