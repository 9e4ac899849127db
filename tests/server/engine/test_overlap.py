"""Overlap launches a step before the previous one's tokens are known, and changes only the time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine_oracle import RecordingRunner, Run, make_engine, request, run_until_done
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import Submit

PROMPT = [5, 9, 17, 120, 44]

asked = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(0, 12),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        # One of these tokens is sampled often enough.
        "stop_token_ids": st.sampled_from([(), tuple(range(3, 60)), tuple(range(3, 300, 2))]),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.0, 1.5]),
        "logprobs": st.sampled_from([None, None, 2]),
        "prompt_logprobs": st.booleans(),
    }
)


def served(engine: Engine, arrivals: list[tuple[int, Submit]]) -> Run:
    run = Run()
    for step in range(8):
        for arrives, submit in arrivals:
            if arrives == step:
                engine.submit(submit)
        run.take(engine.step().outputs)
    return run_until_done(engine, run)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.tuples(st.integers(0, 7), asked), min_size=1, max_size=5),
    blocks=st.integers(14, 40),
    recorded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_kind_of_request_gets_the_same_answer_with_overlap(
    tiny_llama_folder: Path,
    requests: list[tuple[int, dict[str, object]]],
    blocks: int,
    recorded: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)  # noqa: S311 - test data
    arrivals = [
        (arrives, request(str(i), [rng.randrange(3, 300) for _ in range(rng.randint(1, 20))], seed=i, **fields))  # type: ignore[arg-type]
        for i, (arrives, fields) in enumerate(requests)
    ]
    runs = []
    for overlap in (False, True):
        engine = make_engine(
            tiny_llama_folder, blocks=blocks, max_sequences=4, recorded=recorded, overlap=overlap, prefix_cache=False
        )
        runs.append(served(engine, arrivals))
        stats = engine.stats()
        assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        engine.close()
    plain, overlapped = runs
    assert overlapped.tokens == plain.tokens
    assert {name: end.finish_reason for name, end in overlapped.finished.items()} == {
        name: end.finish_reason for name, end in plain.finished.items()
    }
    for name, logprobs in plain.logprobs.items():
        assert [found.logprob for found in overlapped.logprobs[name]] == pytest.approx(
            [found.logprob for found in logprobs], abs=1e-3
        )


def test_steady_decoding_runs_one_step_ahead_and_ends_without_an_extra_step(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, overlap=True)
    runner = engine.runner
    assert isinstance(runner, RecordingRunner)
    engine.submit(request("a", PROMPT, max_tokens=6))
    launched = []
    while engine.has_work:
        engine.step()
        launched.append(len(runner.batches))
    # Six tokens are six steps: the first call launches two, the last none.
    assert launched == [2, 3, 4, 5, 6, 6]


def test_a_request_that_ends_by_its_token_wastes_one_row_and_nothing_else(tiny_llama_folder: Path) -> None:
    first = make_engine(tiny_llama_folder)
    first.submit(request("a", PROMPT, max_tokens=4))
    stop = run_until_done(first).tokens["a"][1]
    engine = make_engine(tiny_llama_folder, overlap=True)
    engine.submit(request("a", PROMPT, max_tokens=9, stop_token_ids=(stop,)))
    run = run_until_done(engine)
    assert run.finished["a"].finish_reason == "stop"
    assert run.tokens["a"][-1] == stop
    engine.submit(request("b", PROMPT, max_tokens=3))
    assert len(run_until_done(engine, run).tokens["b"]) == 3
    for each in (first, engine):
        each.close()


def test_a_request_cancelled_during_its_step_gets_no_more_tokens(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, overlap=True)
    run = Run()
    for name in ("a", "b"):
        engine.submit(request(name, PROMPT, max_tokens=5))
    run.take(engine.step().outputs)
    engine.cancel("a")
    run_until_done(engine, run)
    assert run.finished["a"].finish_reason == "cancelled"
    assert (len(run.tokens["a"]), len(run.tokens["b"])) == (1, 5)
    engine.close()


def test_a_request_waiting_for_a_full_batch_does_not_delay_it(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=2, overlap=True)
    for name in "abc":
        engine.submit(request(name, PROMPT, max_tokens=20))
    run = Run()
    run.take(engine.step().outputs)
    for _ in range(10):
        run.take(engine.step().outputs)
        assert len(engine.scheduler.waiting) == 1
        # The logits after the last known token exist already.
        assert ("a", len(PROMPT) + len(run.tokens["a"])) in engine.runner.logits  # type: ignore[attr-defined]
    run_until_done(engine)
    engine.close()
