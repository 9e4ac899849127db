"""An exception in a step ends the requests of that step; the engine and all others go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_oracle import Run, make_engine, request, run_until_done

from reftserve.server.engine.engine import MAX_FAILED_STEPS, Engine
from reftserve.server.engine.engine_folder import LONGEST_PATH, RunningRecord, make_engine_folder, read_running

PROMPT = list(range(5, 25))


def fail_with(engine: Engine, poison: str) -> None:
    """Let each step fail that computes the named request, after the model has written into the cache."""
    step = engine.runner.step

    def failing(batch: Any, token_ids: Any = None) -> Any:
        logits = step(batch, token_ids)
        if any(poison in chunk.sequence.request_id for chunk in batch.chunks):
            raise IndexError("index out of range in self")
        return logits

    engine.runner.step = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_step_ends_its_requests_and_later_ones_run(tiny_llama_folder: Path, overlap: bool) -> None:
    engine, healthy = (make_engine(tiny_llama_folder, max_sequences=2, overlap=overlap) for _ in range(2))
    for name in ("beside", "poison", "later"):
        engine.submit(request(name, PROMPT, max_tokens=6))
    healthy.submit(request("later", PROMPT, max_tokens=6))
    fail_with(engine, "poison")
    run = run_until_done(engine)
    assert {name: output.finish_reason for name, output in run.finished.items()} == {
        "beside": "failed",
        "poison": "failed",
        "later": "length",
    }
    assert "internal error" in (run.finished["poison"].error or "")
    assert run.tokens["later"] == run_until_done(healthy).tokens["later"]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    for each in (engine, healthy):
        each.close()


def test_a_request_that_fails_while_its_continuations_run_ends_once(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    engine.submit(msgspec.structs.replace(request("scored", PROMPT), continuations=[[5, 6, 7], [8, 9]]))
    fail_with(engine, "scored/1")
    run = run_until_done(engine)
    assert run.finished["scored"].finish_reason == "failed"
    assert engine.stats().kv_blocks_used == 0
    engine.close()


def test_infinities_that_a_failed_step_left_in_blocks_reach_nobody(
    tiny_llama_folder: Path, artifacts: list[Path]
) -> None:
    engine = make_engine(tiny_llama_folder, blocks=16)
    fail_with(engine, "poison")
    engine.submit(request("poison", PROMPT, uses=[(artifacts[1], 1e30)]))
    run_until_done(engine)
    engine.submit(request("clean", PROMPT, max_tokens=20))
    assert run_until_done(engine).finished["clean"].finish_reason == "length"
    engine.close()


def test_a_request_whose_admission_fails_ends_and_others_run(
    tiny_llama_folder: Path, artifacts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_llama_folder)

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room on the device")

    monkeypatch.setattr(engine.runner.bank, "_hot", out_of_memory)
    engine.submit(request("poison", PROMPT, uses=[(artifacts[1], 1.0)]))
    engine.submit(request("clean", PROMPT, max_tokens=5))
    run = run_until_done(engine)
    assert {name: output.finish_reason for name, output in run.finished.items()} == {
        "poison": "failed",
        "clean": "length",
    }
    assert engine.stats().kv_blocks_used == 0
    engine.close()


def test_an_engine_whose_every_step_fails_ends(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    for number in range(MAX_FAILED_STEPS + 1):
        engine.submit(request(f"poison-{number}", PROMPT))
    fail_with(engine, "poison")
    run = Run()
    with pytest.raises(IndexError):
        run_until_done(engine, run)
    assert len(run.finished) == MAX_FAILED_STEPS - 1
    engine.close()


def test_the_record_names_the_requests_of_the_last_step(tiny_llama_folder: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=2)
    assert read_running(tmp_path) == set()
    record = RunningRecord(tmp_path)
    assert read_running(tmp_path) == set()
    engine.on_admission = record.write
    for name in ("a", "b", "waits"):
        engine.submit(request(name, PROMPT, max_tokens=4))
    engine.step()
    assert read_running(tmp_path) == {"a", "b"}
    run_until_done(engine)
    assert read_running(tmp_path) == {"waits"}
    record.write(f"request-{number}" for number in range(100_000))
    assert "request-0" in read_running(tmp_path)
    engine.close()


def test_the_folder_of_the_socket_has_a_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * LONGEST_PATH)
    long.mkdir()
    for temporary in (long, tmp_path / "missing"):
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        with make_engine_folder() as folder:
            assert not folder.startswith(str(temporary))
