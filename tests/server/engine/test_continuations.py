"""Continuations of a prompt score as if each were read alone, and the prompt is computed once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_oracle import make_engine, request, run_until_done, save_edits, scaled_edits
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from transformers import PreTrainedModel

from reftserve.interventions import LowRankEdit, PlacedEdit, Positions, attach, load_artifact
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import Submit, TokenOutput

TOLERANCE = 2e-3  # of a log-probability; logits agree to 1e-4 of the largest, which is up to 20
PROMPT = list(range(5, 43))
LABELS = [[7, 2], [7, 8, 2], [9, 2], [10], [11, 12, 13, 14, 15, 16, 2]]


def scored(name: str, prompt: list[int], continuations: list[list[int]], **options: object) -> Submit:
    return replace(request(name, prompt, max_tokens=0, **options), continuations=continuations)  # type: ignore[arg-type]


def one_by_one(model: PreTrainedModel, submit: Submit, edits: list[PlacedEdit]) -> list[list[float]]:
    found, n_prompt = [], len(submit.prompt_ids)
    for continuation in submit.continuations:
        with torch.no_grad(), attach(model, edits, n_prompt):
            logits = model(torch.tensor([submit.prompt_ids + continuation]), use_cache=False).logits[0]
        rows = torch.log_softmax(logits[n_prompt - 1 : -1], dim=-1)
        found.append([float(row[token]) for row, token in zip(rows, continuation, strict=True)])
    return found


def assert_as_one_by_one(model: PreTrainedModel, submit: Submit, output: TokenOutput, edits: list[PlacedEdit]) -> None:
    assert output.finish_reason == "length", output.error
    expected = one_by_one(model, submit, edits)
    assert [len(each) for each in output.continuation_logprobs] == [len(each) for each in expected]
    for logprobs, alone in zip(output.continuation_logprobs, expected, strict=True):
        assert logprobs == pytest.approx(alone, abs=TOLERANCE)


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert not engine.runner.bank._slots.keys() - engine.runner.bank._idle.keys()


uses = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, -0.5])), max_size=2, unique_by=lambda use: use[0])


@settings(max_examples=settings().max_examples // 3)
@given(
    plans=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 9), max_size=5), uses), min_size=1, max_size=5
    ),
    blocks=st.integers(13, 60),
    block_size=st.sampled_from([4, 5]),
    max_batch_tokens=st.integers(2, 64),
    max_sequences=st.integers(1, 8),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_continuations_score_as_alone_in_any_batch(
    tiny_llama_folder: Path,
    oracle_model: PreTrainedModel,
    artifacts: list[Path],
    plans: list[tuple[int, list[int], list[tuple[int, float]]]],
    blocks: int,
    block_size: int,
    max_batch_tokens: int,
    max_sequences: int,
    prefix_cache: bool,
    seed: int,
) -> None:
    engine = make_engine(
        tiny_llama_folder,
        blocks=blocks,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        prefix_cache=prefix_cache,
    )
    rng = random.Random(seed)  # noqa: S311 - test data
    shared = rng.sample(range(3, 300), 40)
    submits = []
    for index, (n_prompt, lengths, used) in enumerate(plans):
        named = [(artifacts[artifact], scale) for artifact, scale in used]
        continuations = [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]
        # A request that generates, in the same batch.
        submits.append(
            scored(str(index), shared[:n_prompt], continuations, uses=named)
            if continuations
            else request(str(index), shared[:n_prompt], uses=named, max_tokens=4)
        )
        engine.submit(submits[-1])
    run = run_until_done(engine)
    for submit, (_, _, used) in zip(submits, plans, strict=True):
        edits = [edit for number, scale in used for edit in scaled_edits(load_artifact(artifacts[number]), scale)]
        if submit.continuations:
            assert_as_one_by_one(oracle_model, submit, run.finished[submit.request_id], edits)
        else:
            assert len(run.tokens[submit.request_id]) == 4
    assert_nothing_is_held(engine)
    engine.close()


def test_continuations_score_the_same_with_overlapped_recorded_decodes(
    tiny_llama_folder: Path, oracle_model: PreTrainedModel, artifacts: list[Path]
) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=4, recorded=True, overlap=True)
    submit = scored("scored", PROMPT, LABELS, uses=[(artifacts[5], 1.0)])
    engine.submit(request("before", PROMPT[:9], max_tokens=20))
    engine.submit(submit)
    engine.submit(request("after", PROMPT[:9], max_tokens=20))
    run = run_until_done(engine)
    edits = scaled_edits(load_artifact(artifacts[5]), 1.0)
    assert_as_one_by_one(oracle_model, submit, run.finished["scored"], edits)
    assert run.tokens["before"] == run.tokens["after"]
    assert_nothing_is_held(engine)
    engine.close()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_whole_prompt_is_computed_once(tiny_llama_folder: Path, artifacts: list[Path], prefix_cache: bool) -> None:
    engine = make_engine(tiny_llama_folder, prefix_cache=prefix_cache)
    engine.submit(scored("a", PROMPT, LABELS, uses=[(artifacts[2], 1.0)]))
    computed = 0
    while engine.has_work or engine.is_loading:
        engine.step()
    computed = sum(c.stop - c.start for batch in engine.runner.batches for c in batch.chunks)  # type: ignore[attr-defined]
    assert engine.stats().prompt_tokens == len(PROMPT)
    assert computed == len(PROMPT) + sum(len(label) - 1 for label in LABELS), "their last tokens need no computing"
    engine.close()


def test_more_continuations_than_the_batch_holds_still_share_the_prompt(
    tiny_llama_folder: Path, oracle_model: PreTrainedModel
) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=2)
    submit = scored("a", PROMPT, [[token, token + 1, 2] for token in range(50, 90)])
    engine.submit(submit)
    run = run_until_done(engine)
    assert engine.stats().prompt_tokens == len(PROMPT)
    assert_as_one_by_one(oracle_model, submit, run.finished["a"], [])
    engine.close()


def test_a_prompt_seen_before_is_found_in_the_cache(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    outputs = []
    for name in ("first", "second"):
        engine.submit(scored(name, PROMPT, LABELS))
        outputs.append(run_until_done(engine).finished[name])
    assert [output.cached_tokens for output in outputs] == [0, 36]
    assert outputs[1].continuation_logprobs == [
        pytest.approx(each, abs=TOLERANCE) for each in outputs[0].continuation_logprobs
    ]
    engine.close()


def test_edits_of_generated_positions_touch_the_continuation_and_edits_of_the_prompt_do_not(
    tiny_llama_folder: Path, oracle_model: PreTrainedModel, artifacts: list[Path]
) -> None:
    # Two continuations with equal beginnings: if the label counted as prompt, the positions f7+l7 would move.
    for artifact in (artifacts[1], artifacts[4], artifacts[5]):
        engine = make_engine(tiny_llama_folder)
        submit = scored("a", PROMPT[:5], LABELS, uses=[(artifact, 1.0)])
        engine.submit(submit)
        output = run_until_done(engine).finished["a"]
        assert_as_one_by_one(oracle_model, submit, output, scaled_edits(load_artifact(artifact), 1.0))
        engine.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])  # during the prompt, on hold, during forks in two waves
def test_a_cancelled_request_frees_all_its_blocks_and_slots(
    tiny_llama_folder: Path, artifacts: list[Path], steps: int
) -> None:
    engine = make_engine(tiny_llama_folder, max_batch_tokens=4, max_sequences=2)
    engine.submit(scored("a", PROMPT[:6], LABELS, uses=[(artifacts[5], 1.0)]))
    while engine.is_loading:
        engine.step()
    for _ in range(steps):
        engine.step()
    engine.cancel("a")
    assert [output.finish_reason for output in engine.step().outputs] == ["cancelled"]
    assert_nothing_is_held(engine)
    engine.close()


@pytest.mark.parametrize("positions", ["l1", "generated"])
def test_an_overflowing_edit_fails_its_request_alone(
    tiny_llama_folder: Path, oracle_model: PreTrainedModel, tmp_path: Path, positions: str
) -> None:
    zeros, huge = torch.zeros(1, 32), torch.full((1, 32), 1e30)
    edit = LowRankEdit(zeros, torch.full((1,), 1e30), huge, torch.zeros(1, dtype=torch.int8), torch.ones(1))
    folder = save_edits(tmp_path / "huge", [PlacedEdit(1, Positions.parse(positions), edit)], positions=positions)
    engine = make_engine(tiny_llama_folder)
    fine = scored("fine", PROMPT, LABELS)
    engine.submit(scored("wrong", PROMPT, LABELS, uses=[(folder, 1.0)]))
    engine.submit(fine)
    run = run_until_done(engine)
    assert run.finished["wrong"].finish_reason == "error"
    assert "not finite" in (run.finished["wrong"].error or "")
    assert_as_one_by_one(oracle_model, fine, run.finished["fine"], [])
    assert_nothing_is_held(engine)
    engine.close()


def test_a_request_that_does_not_fit_is_refused(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, blocks=10)
    engine.submit(scored("a", PROMPT, [[5] * 4]))
    assert "need up to 41 tokens" in (run_until_done(engine).finished["a"].error or "")
    engine.close()
