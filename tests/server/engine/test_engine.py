"""The engine's guarantees on residency, cancellation, swapping and its frozen base, on a tiny model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from engine_oracle import Run, make_engine, request, run_until_done, save_edits, save_random

from reftserve.interventions import LowRankEdit, PlacedEdit, Positions, model_checksum
from reftserve.server.engine import runner
from reftserve.server.engine.bank import Bank
from reftserve.server.engine.edit_plan import LayerEdits, plan_edits
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit
from reftserve.server.engine.scheduler import Chunk

PROMPT = list(range(5, 45))


def test_loads_swaps_and_cancellations_never_change_the_base_weights(
    tiny_llama_folder: Path, artifacts: list[Path]
) -> None:
    engine = make_engine(tiny_llama_folder, bank_rows=40)
    before = model_checksum(engine.runner.model)
    for round_ in range(3):
        for index, artifact in enumerate(artifacts):
            engine.submit(request(f"{round_}-{index}", PROMPT, uses=[(artifact, 1.0)]))
        engine.step()
        engine.cancel(f"{round_}-0")
        run_until_done(engine)
    assert model_checksum(engine.runner.model) == before
    engine.close()


def test_a_running_request_keeps_its_rows_while_others_are_swapped_through_the_bank(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    mine = save_random(tmp_path / "mine", [(1, "all")], rank=4, seed=50)
    others = [save_random(tmp_path / str(i), [(1, "l1")], rank=4, seed=i) for i in range(8)]
    alone = make_engine(tiny_llama_folder)
    alone.submit(request("mine", PROMPT, uses=[(mine, 1.0)], max_tokens=30))
    expected = run_until_done(alone).tokens["mine"]
    engine = make_engine(tiny_llama_folder, bank_rows=9)  # row 0, mine, and one other
    engine.submit(request("mine", PROMPT, uses=[(mine, 1.0)], max_tokens=30))
    for index, other in enumerate(others):
        engine.submit(request(f"other-{index}", PROMPT[:20], uses=[(other, 1.0)], max_tokens=2))
    run = run_until_done(engine)
    assert run.tokens["mine"] == expected
    assert all(len(run.tokens[f"other-{i}"]) == 2 for i in range(8))
    for each in (alone, engine):
        each.close()


def test_an_edit_stays_whole_when_its_folder_is_deleted_while_it_runs(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "gone", [(2, "all")], rank=2, seed=3)
    engine = make_engine(tiny_llama_folder)
    engine.submit(request("kept", PROMPT, uses=[(folder, 1.0)], max_tokens=20))
    run = Run()
    while not engine.scheduler.running:
        run.take(engine.step().outputs)
    for file in folder.iterdir():
        file.unlink()
    run_until_done(engine, run)
    assert len(run.tokens["kept"]) == 20
    engine.close()


def test_an_intervention_is_loaded_while_its_request_is_queued(tiny_llama_folder: Path, artifacts: list[Path]) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    engine.submit(request("first", PROMPT, max_tokens=200))
    engine.step()
    second = request("second", PROMPT, uses=[(artifacts[0], 1.0)])
    engine.submit(second)
    for _ in range(150):
        engine.step()
        time.sleep(0.001 if engine.is_loading else 0)
    assert [sequence.request_id for sequence in engine.scheduler.running] == ["first"]
    assert engine.loader.get(second.interventions[0].content_hash) is not None
    engine.close()


def test_a_missing_or_changed_artifact_fails_its_request_alone(
    tiny_llama_folder: Path, tmp_path: Path, artifacts: list[Path]
) -> None:
    engine = make_engine(tiny_llama_folder)
    params = SamplingParams(max_tokens=4)
    engine.submit(Submit("missing", PROMPT, params, (InterventionRef(str(tmp_path / "nowhere"), "1" * 64),)))
    engine.submit(Submit("changed", PROMPT, params, (InterventionRef(str(artifacts[0]), "0" * 64),)))
    engine.submit(Submit("plain", PROMPT, params))
    run = run_until_done(engine)
    assert {name: run.finished[name].finish_reason for name in run.finished} == {
        "missing": "failed",
        "changed": "failed",
        "plain": "length",
    }
    assert "nowhere" in (run.finished["missing"].error or "")
    assert "content hash" in (run.finished["changed"].error or "")
    engine.close()


def test_a_request_that_can_never_fit_is_refused_with_the_reason(tiny_llama_folder: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama_folder, blocks=10, block_size=4, bank_rows=5)
    engine.submit(request("long", PROMPT, max_tokens=8))
    wide = save_random(tmp_path / "wide", [(0, "l1")], rank=6)
    engine.submit(request("wide", PROMPT[:5], uses=[(wide, 1.0)]))
    foreign = save_random(tmp_path / "foreign", [(0, "l1")], rank=1, hidden=16)
    engine.submit(request("other base", PROMPT[:5], uses=[(foreign, 1.0)]))
    run = run_until_done(engine)
    assert "KV cache holds 40" in (run.finished["long"].error or "")
    assert "bank has 4" in (run.finished["wide"].error or "")
    assert "hidden size" in (run.finished["other base"].error or "")
    engine.close()


def test_a_cancelled_request_frees_its_blocks_at_once(tiny_llama_folder: Path, artifacts: list[Path]) -> None:
    engine = make_engine(tiny_llama_folder)
    engine.submit(request("gone", PROMPT, uses=[(artifacts[1], 1.0)], max_tokens=100))
    while not engine.stats().kv_blocks_used:
        engine.step()
    engine.cancel("gone")
    engine.cancel("never heard of")
    assert engine.stats().kv_blocks_used == 0
    assert not engine.scheduler.running
    engine.close()


def test_a_long_prompt_does_not_stall_running_streams(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_batch_tokens=8)
    engine.submit(request("stream", PROMPT[:4], max_tokens=40))
    engine.step()
    engine.submit(request("long", PROMPT, max_tokens=1))
    for _ in range(5):
        outputs = engine.step().outputs
        assert any(output.request_id == "stream" and output.token_ids for output in outputs)
    engine.close()


def test_a_stop_token_ends_the_answer_and_is_reported(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    engine.submit(request("free", PROMPT, max_tokens=6))
    free = run_until_done(engine).tokens["free"]
    engine.submit(request("stopped", PROMPT, max_tokens=6, stop_token_ids=(free[2],)))
    run = run_until_done(engine)
    assert run.finished["stopped"].finish_reason == "stop"
    assert run.tokens["stopped"] == free[: free.index(free[2]) + 1]
    engine.close()


@pytest.mark.parametrize(
    ("artifact", "prefill_layers", "decode_layers"),
    [(0, [1], []), (1, [0, 1, 2, 3], []), (3, [2], []), (4, [], [1]), (5, [0, 3], [0, 3])],
    ids=["l1", "f7+l7", "prompt", "generated", "all"],
)
def test_a_decode_step_edits_only_where_generated_tokens_are_edited(
    tiny_llama_folder: Path,
    artifacts: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    artifact: int,
    prefill_layers: list[int],
    decode_layers: list[int],
) -> None:
    """A decode step of a prompt-only intervention is a plain base-model step."""
    planned: list[tuple[bool, list[int]]] = []

    def recorded(chunks: list[Chunk], bank: Bank, device: torch.device) -> dict[int, LayerEdits]:
        plan = plan_edits(chunks, bank, device)
        planned.append((all(chunk.is_decode for chunk in chunks), sorted(plan)))
        return plan

    monkeypatch.setattr(runner, "plan_edits", recorded)
    engine = make_engine(tiny_llama_folder)
    engine.submit(request("one", PROMPT, uses=[(artifacts[artifact], 1.0)], max_tokens=4))
    run_until_done(engine)
    assert planned[0] == (False, prefill_layers)
    assert planned[1:] == [(True, decode_layers)] * 3
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_overflowing_intervention_fails_its_request_and_leaves_nothing_behind(
    tiny_llama_folder: Path, tmp_path: Path, temperature: float
) -> None:
    """Its blocks hold infinities. Requests in the same step, or later on these blocks, must not read them."""
    edit = LowRankEdit(
        A=torch.zeros(1, 32),
        b=torch.full((1,), 1e30),
        U=torch.full((1, 32), 1e30),
        act=torch.zeros(1, dtype=torch.int8),
        scale=torch.ones(1),
    )
    overflow = save_edits(tmp_path / "overflow", [PlacedEdit(0, Positions.parse("prompt"), edit)])
    prompts = {"short": PROMPT[:3], "long": PROMPT[:17], "after": PROMPT[:37]}
    alone = make_engine(tiny_llama_folder)
    for name, prompt in prompts.items():
        alone.submit(request(name, prompt, max_tokens=20))
    expected = run_until_done(alone).tokens
    run = Run()
    engine = make_engine(tiny_llama_folder, blocks=28, max_batch_tokens=24)
    engine.submit(request("first", PROMPT[:10], max_tokens=20))  # so that the overflowing request gets block 0
    for name in ("short", "long"):
        engine.submit(request(name, prompts[name], max_tokens=20))
    while len(engine.scheduler.running) < 3 or any(s.n_generated == 0 for s in engine.scheduler.running):
        run.take(engine.step().outputs)
    engine.cancel("first")
    engine.submit(request("overflow", PROMPT, uses=[(overflow, 1.0)], temperature=temperature))
    run_until_done(engine, run)
    engine.submit(request("cancelled", PROMPT, uses=[(overflow, 1.0)]))
    engine.step()
    engine.cancel("cancelled")
    engine.submit(request("after", prompts["after"], max_tokens=20))
    run_until_done(engine, run)
    assert run.finished["overflow"].finish_reason == "error"
    assert "not finite" in (run.finished["overflow"].error or "")
    assert {name: run.tokens[name] for name in expected} == expected
    for each in (alone, engine):
        each.close()


def test_prompt_interventions_free_their_rows_while_their_answers_continue(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folders = [save_random(tmp_path / str(i), [(1, "f2+l2")], rank=4, seed=i) for i in range(4)]
    engine = make_engine(tiny_llama_folder, bank_rows=9)
    for index, folder in enumerate(folders):
        engine.submit(request(str(index), PROMPT[:10], uses=[(folder, 1.0)], max_tokens=40))
    while not engine.scheduler.running or engine.is_loading or engine.scheduler.waiting:
        engine.step()
    assert len(engine.scheduler.running) == 4
    run = run_until_done(engine)
    alone = make_engine(tiny_llama_folder)
    for index, folder in enumerate(folders):
        alone.submit(request(str(index), PROMPT[:10], uses=[(folder, 1.0)], max_tokens=40))
        assert run_until_done(alone).tokens[str(index)][-len(run.tokens[str(index)]) :] == run.tokens[str(index)]
    for each in (engine, alone):
        each.close()


def test_the_offered_context_fits_the_cache(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, blocks=16, block_size=4)
    assert engine.runner.max_context == 64
    engine.close()
