"""The server's child processes: an engine that is restarted, and a worker that ends with its borrowed weights."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from reftserve.server import supervisor
from reftserve.server.base.lent_tensor import LentTensor
from reftserve.server.engine.config import EngineConfig
from reftserve.server.engine.engine_errors import EngineDied
from reftserve.server.engine.messages import Ready
from reftserve.server.inference.engine_client import EngineClient
from reftserve.server.inference.metrics import Metrics
from reftserve.server.settings import Settings
from reftserve.server.supervisor import FIRST_PAUSE_S, keep_engine, keep_worker, may_be_on_gpu

LENT = LentTensor("float32", (1,), (1,), 0, 0, b"handle", 4, 0, b"", 0, b"", False)
ENGINE, WORKER = "reftserve.server.engine.process", "reftserve.server.training.worker"
TIMEOUT_S = 120


class LendingEngine(EngineClient):
    """A real engine on the CPU that claims to lend weights. The worker computes on the CPU and opens none of them."""

    async def until_ready(self) -> Ready:
        return msgspec.structs.replace(await super().until_ready(), lent=[LENT])


def config(model: Path) -> EngineConfig:
    return EngineConfig(model_folder=str(model), cpu_kernels="never", threads=1, kv_cache_bytes=1 << 20)


@asynccontextmanager
async def kept_worker(engine: EngineClient, model: Path, data: Path) -> AsyncIterator[None]:
    settings = Settings(model=str(model), data=data, device="cpu", cpu_kernels="never", worker_threads=1)
    keeper = asyncio.create_task(keep_worker(settings, engine))
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await engine.stop()
    assert children(WORKER) == []


def children(module: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if module in child.cmdline():
                found.append(child)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("engine_class", [EngineClient, LendingEngine], ids=["nothing is lent", "weights are lent"])
def test_on_a_gpu_the_worker_starts_after_the_engine_and_ends_with_the_lent_weights(
    engine_class: type[EngineClient], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "may_be_on_gpu", lambda settings: True)

    async def story() -> None:
        engine = engine_class(config(tiny_llama_folder))
        async with kept_worker(engine, tiny_llama_folder, tmp_path):
            await asyncio.sleep(0.2)
            assert children(WORKER) == []
            await engine.start()
            await until(lambda: (tmp_path / "worker.heartbeat").exists())
            (worker,) = children(WORKER)
            await engine.stop()
            if engine_class is EngineClient:
                await asyncio.sleep(0.5)
                assert children(WORKER) == [worker]
                return
            await until(lambda: children(WORKER) == [])
            await asyncio.sleep(FIRST_PAUSE_S + 0.5)
            assert children(WORKER) == []
            await engine.start()
            await until(lambda: len(children(WORKER)) == 1)

    asyncio.run(story())


def test_on_the_cpu_the_worker_loads_while_the_engine_loads(tiny_llama_folder: Path, tmp_path: Path) -> None:
    async def story() -> None:
        engine = EngineClient(config(tiny_llama_folder))
        async with kept_worker(engine, tiny_llama_folder, tmp_path):
            await until(lambda: (tmp_path / "worker.heartbeat").exists())
            assert engine.ready is None

    asyncio.run(story())


def test_an_engine_is_restarted_even_if_the_first_restart_fails(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(tiny_llama_folder, tmp_path / "model")

    async def story() -> None:
        engine = EngineClient(config(model))
        keeper = asyncio.create_task(keep_engine(engine, Metrics(lambda: None)))
        await asyncio.wait_for(engine.until_ready(), TIMEOUT_S)
        model.rename(tmp_path / "moved")
        children(ENGINE)[0].kill()
        await until(lambda: "the engine did not start" in caplog.text)
        assert engine.ready is None
        (tmp_path / "moved").rename(model)
        await asyncio.wait_for(engine.until_ready(), TIMEOUT_S)
        assert not keeper.done()
        keeper.cancel()
        await engine.stop()

    asyncio.run(story())


def test_an_engine_that_never_started_is_not_restarted(tmp_path: Path) -> None:
    async def story() -> None:
        engine = EngineClient(config(tmp_path / "nothing"))
        with pytest.raises(EngineDied, match="did not start"):
            await keep_engine(engine, Metrics(lambda: None))

    asyncio.run(story())


def test_an_engine_that_cannot_be_restarted_ends_its_keeper(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_FAILED_STARTS", 2)
    model = shutil.copytree(tiny_llama_folder, tmp_path / "model")

    async def story() -> None:
        engine = EngineClient(config(model))
        keeper = asyncio.create_task(keep_engine(engine, Metrics(lambda: None)))
        await asyncio.wait_for(engine.until_ready(), TIMEOUT_S)
        shutil.rmtree(model)
        children(ENGINE)[0].kill()
        with pytest.raises(EngineDied, match="did not start"):
            await asyncio.wait_for(keeper, TIMEOUT_S)

    asyncio.run(story())


def test_an_engine_whose_messages_cannot_be_read_is_ended(tiny_llama_folder: Path) -> None:
    async def story() -> None:
        engine = EngineClient(config(tiny_llama_folder))
        await engine.start()
        assert engine._receiver is not None
        engine._receiver.cancel()
        assert await asyncio.wait_for(engine.wait(), TIMEOUT_S) == -signal.SIGKILL

    asyncio.run(story())


def test_a_file_in_the_working_folder_is_not_imported_by_the_engine(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)

    async def story() -> None:
        engine = EngineClient(config(tiny_llama_folder))
        await engine.start()
        await engine.stop()

    asyncio.run(story())


@pytest.mark.parametrize("driver", [True, False], ids=["a driver", "no driver"])
def test_a_gpu_is_expected_if_the_settings_ask_for_it_or_a_driver_exists(
    driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver:
        (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(supervisor, "GPU_DRIVERS", (str(tmp_path / "nvidiactl"),))
    asked = {device: may_be_on_gpu(Settings(device=device)) for device in ("auto", "cpu", "cuda", "cuda:1")}
    assert asked == {"auto": driver, "cpu": False, "cuda": True, "cuda:1": True}
