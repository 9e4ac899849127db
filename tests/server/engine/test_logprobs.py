"""Log-probabilities of prompts and answers equal those of the request alone, in any batch and chunking."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_oracle import make_engine, request, run_until_done, scaled_edits
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from reftserve.interventions import PlacedEdit, attach, load_artifact
from reftserve.server.engine.messages import TokenLogprobs

TOLERANCE = 2e-3  # of a log-probability; logits agree to 1e-4 of the largest, which is up to 20


def oracle_logprobs(model: PreTrainedModel, tokens: list[int], n_prompt: int, edits: list[PlacedEdit]) -> torch.Tensor:
    with torch.no_grad(), attach(model, edits, n_prompt):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, -1)


def assert_close(found: list[TokenLogprobs], tokens: list[int], expected: torch.Tensor) -> None:
    assert [entry.token_id for entry in found] == tokens
    for entry, token, row in zip(found, tokens, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        best = row.topk(len(entry.top)).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=TOLERANCE)
        assert [float(row[other]) for other, _ in entry.top] == pytest.approx(best, abs=TOLERANCE)


@settings(max_examples=settings().max_examples // 2)
@given(
    plans=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 6), st.integers(0, 3), st.integers(0, 5), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    blocks=st.integers(12, 40),
    max_batch_tokens=st.integers(3, 64),
    seed=st.integers(0, 1000),
)
def test_logprobs_are_those_of_a_plain_forward_pass(
    tiny_llama_folder: Path,
    oracle_model: PreTrainedModel,
    artifacts: list[Path],
    plans: list[tuple[int, int, int, int, bool]],
    blocks: int,
    max_batch_tokens: int,
    seed: int,
) -> None:
    engine = make_engine(tiny_llama_folder, blocks=blocks, max_batch_tokens=max_batch_tokens)
    shared = random.Random(seed).sample(range(3, 300), 40)  # noqa: S311 - test data
    submits = [
        request(
            str(i),
            shared[:n_prompt],
            uses=[(artifacts[artifact], 1.0)],
            max_tokens=max_tokens,
            logprobs=count,
            prompt_logprobs=scored or max_tokens == 0,
        )
        for i, (n_prompt, max_tokens, count, artifact, scored) in enumerate(plans)
    ]
    for submit in submits:
        engine.submit(submit)
    run = run_until_done(engine)
    for submit, (n_prompt, max_tokens, _, artifact, scored) in zip(submits, plans, strict=True):
        name = submit.request_id
        assert len(run.tokens[name]) == max_tokens
        edits = scaled_edits(load_artifact(artifacts[artifact]), 1.0)
        expected = oracle_logprobs(oracle_model, submit.prompt_ids + run.tokens[name], n_prompt, edits)
        if scored or max_tokens == 0:
            assert_close(run.prompt_logprobs[name], submit.prompt_ids[1:], expected[: n_prompt - 1])
        else:
            assert run.prompt_logprobs[name] == []
        assert_close(run.logprobs[name], run.tokens[name], expected[n_prompt - 1 :])
    engine.close()


def test_prompt_logprobs_never_come_from_the_prefix_cache(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    prompt = list(range(5, 45))
    for name in ("first", "second"):
        engine.submit(request(name, prompt, max_tokens=2, logprobs=1, prompt_logprobs=name == "second"))
        run = run_until_done(engine)
    assert len(run.prompt_logprobs["second"]) == 39
    assert run.finished["second"].cached_tokens == 0
    engine.close()


def test_logprobs_are_the_models_own_under_any_bias(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    engine.submit(request("free", [5, 6, 7], max_tokens=1, logprobs=1))
    engine.submit(request("biased", [5, 6, 7], max_tokens=1, logprobs=1, logit_bias=((99, 1000.0),)))
    run = run_until_done(engine)
    assert run.tokens["biased"] == [99]
    assert run.logprobs["biased"][0].top == run.logprobs["free"][0].top
    assert run.logprobs["biased"][0].logprob < run.logprobs["free"][0].logprob
    engine.close()
