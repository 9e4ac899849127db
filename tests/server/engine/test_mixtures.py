"""I1, I2, I5: in any mixture, under chunking, preemption and cancellation, a request gets its result alone."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from engine_oracle import (
    RecordingRunner,
    Run,
    make_engine,
    oracle_logits,
    request,
    run_until_done,
    scaled_edits,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from reftserve.interventions import PlacedEdit, load_artifact
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import Submit

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Planned:
    """n_prompt, n_shared: tokens of its prompt, and of the beginning common to all requests at least as long."""

    n_prompt: int
    n_shared: int
    max_tokens: int
    uses: list[tuple[int, float]]
    priority: int
    arrives: int
    cancelled: int | None


uses = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.25, 1.0, -1.5])), max_size=3, unique_by=lambda use: use[0]
)
planned = st.builds(
    Planned,
    n_prompt=st.integers(1, 40),
    n_shared=st.sampled_from([0, 9, 24, 40]),
    max_tokens=st.integers(1, 8),
    uses=uses,
    priority=st.sampled_from([0, 0, -1, 1]),
    arrives=st.integers(0, 6),
    cancelled=st.one_of(st.none(), st.integers(0, 10)),
)


@given(
    plans=st.lists(planned, min_size=1, max_size=8),
    blocks=st.integers(12, 60),
    bank_rows=st.integers(50, 120),
    max_batch_tokens=st.integers(3, 64),
    max_sequences=st.integers(1, 8),
    prefix_cache=st.booleans(),
    host_bytes=st.sampled_from([0, 1 << 30]),
    recorded=st.sampled_from([False, False, True]),
    overlap=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_request_in_a_mixture_gets_the_logits_it_would_get_alone(
    tiny_llama_folder: Path,
    oracle_model: PreTrainedModel,
    artifacts: list[Path],
    plans: list[Planned],
    blocks: int,
    bank_rows: int,
    max_batch_tokens: int,
    max_sequences: int,
    prefix_cache: bool,
    host_bytes: int,
    recorded: bool,
    overlap: bool,
    seed: int,
) -> None:
    engine = make_engine(
        tiny_llama_folder,
        blocks=blocks,
        bank_rows=bank_rows,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        prefix_cache=prefix_cache,
        host_bytes=host_bytes,
        recorded=recorded,
        overlap=overlap,
    )
    rng = random.Random(seed)  # noqa: S311 - test data
    shared = [rng.randrange(3, 300) for _ in range(40)]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [copied(artifact, Path(scratch)) for artifact in artifacts]
        submits = [
            request(
                str(i),
                (shared[: plan.n_shared] + [rng.randrange(3, 300) for _ in range(40)])[: plan.n_prompt],
                uses=[(folders[index], scale) for index, scale in plan.uses],
                max_tokens=plan.max_tokens,
                priority=plan.priority,
            )
            for i, plan in enumerate(plans)
        ]
        run = run_with_arrivals(engine, plans, submits)
        run_until_done(engine, run, until=lambda: not engine.is_loading)
    # Running, waiting and preempted requests keep their version although the files are gone and the bank is small.
    run_until_done(engine, run)
    assert run.finished.keys() == {submit.request_id for submit in submits}
    for plan, submit in zip(plans, submits, strict=True):
        finish = run.finished[submit.request_id].finish_reason
        assert finish == "length" or (plan.cancelled is not None and finish == "cancelled")
        edits = [e for i, s in plan.uses for e in scaled_edits(load_artifact(artifacts[i]), s)]
        assert_as_alone(oracle_model, engine, submit, run.tokens[submit.request_id], edits)
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    engine.close()


def copied(artifact: Path, into: Path) -> Path:
    return Path(shutil.copytree(artifact, into / artifact.name, copy_function=os.link))


def run_with_arrivals(engine: Engine, plans: list[Planned], submits: list[Submit]) -> Run:
    run = Run()
    for step in range(11):
        for plan, submit in zip(plans, submits, strict=True):
            if plan.arrives == step:
                engine.submit(submit)
            if plan.cancelled == step or (plan.cancelled is not None and plan.cancelled < plan.arrives == step):
                engine.cancel(submit.request_id)
        run.take(engine.step().outputs)
    return run


def assert_as_alone(
    model: PreTrainedModel, engine: Engine, submit: Submit, tokens: list[int], edits: list[PlacedEdit]
) -> None:
    """Check that each token's logits are those of the request alone, and that it is greedy up to near-ties."""
    if not tokens:
        return
    runner = engine.runner
    assert isinstance(runner, RecordingRunner)
    n_prompt = len(submit.prompt_ids)
    alone = oracle_logits(model, submit.prompt_ids + tokens, n_prompt, edits)
    for index, token in enumerate(tokens):
        mixed = runner.logits[submit.request_id, n_prompt + index]
        scale = max(1.0, float(alone[index].abs().max()))
        assert float((mixed - alone[index]).abs().max()) <= TOLERANCE * scale
        assert float(alone[index].max() - alone[index][token]) <= 2 * TOLERANCE * scale


@given(
    my_uses=uses,
    plans=st.lists(planned, min_size=1, max_size=6),
    max_batch_tokens=st.integers(3, 64),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_request_gets_bitwise_equal_logits_in_any_float32_mixture(
    tiny_llama_folder: Path,
    artifacts: list[Path],
    my_uses: list[tuple[int, float]],
    plans: list[Planned],
    max_batch_tokens: int,
    prefix_cache: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)  # noqa: S311 - test data
    shared = [rng.randrange(3, 300) for _ in range(40)]
    mine = request("mine", shared[:30], uses=[(artifacts[index], scale) for index, scale in my_uses], max_tokens=6)
    submits = [
        request(
            str(i),
            (shared[: plan.n_shared] + [rng.randrange(3, 300) for _ in range(40)])[: plan.n_prompt],
            uses=[(artifacts[index], scale) for index, scale in plan.uses],
            max_tokens=plan.max_tokens,
        )
        for i, plan in enumerate(plans)
    ]
    alone = make_engine(tiny_llama_folder, max_batch_tokens=64)
    alone.submit(mine)
    run_until_done(alone)
    mixed = make_engine(
        tiny_llama_folder, max_batch_tokens=max_batch_tokens, blocks=60, bank_rows=120, prefix_cache=prefix_cache
    )
    arrives = Planned(
        n_prompt=30, n_shared=30, max_tokens=6, uses=my_uses, priority=0, arrives=seed % 4, cancelled=None
    )
    run_until_done(mixed, run_with_arrivals(mixed, [*plans, arrives], [*submits, mine]))
    for index in range(6):
        key = ("mine", 30 + index)
        assert torch.equal(mixed.runner.logits[key], alone.runner.logits[key])  # type: ignore[attr-defined]
    alone.close()
    mixed.close()
