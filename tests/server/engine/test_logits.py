"""Penalties, biases and log-probabilities follow their definitions, each row by its own request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import make_engine, request, run_until_done
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from reftserve.server.engine.logits import ArrivingLogprobs, adjust
from reftserve.server.engine.sequence import Sequence
from reftserve.server.engine.token_counts import TokenCounts

VOCABULARY = 40

tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
sequences = st.builds(
    lambda prompt, answer, fields: sequence([1, *prompt], answer, **fields),
    tokens,
    tokens,
    st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 2.0]),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=4).map(
                lambda biases: tuple(biases.items())
            ),
            "min_tokens": st.integers(0, 12),
            "stop_token_ids": st.sampled_from([(), (2,), (2, 7)]),
        },
    ),
)


def sequence(prompt: list[int], answer: list[int], **sampling: object) -> Sequence:
    found = Sequence.from_submit(request("any", prompt, **sampling))
    found.token_ids += answer
    return found


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(logits: torch.Tensor, *rows: Sequence) -> torch.Tensor:
    changed = logits.clone()
    adjust(changed, list(rows))
    return changed


@given(mates=st.lists(sequences, max_size=4), mine=sequences)
def test_a_row_is_adjusted_independently_of_the_other_rows(mates: list[Sequence], mine: Sequence) -> None:
    logits = random_logits(len(mates) + 1)
    assert torch.equal(adjusted(logits, *mates, mine)[-1], adjusted(logits[-1:], mine)[0])


@given(mine=sequences)
def test_a_row_is_adjusted_as_penalties_and_biases_are_defined(mine: Sequence) -> None:
    logits, sampling = random_logits(1), mine.sampling
    expected = logits.clone()
    if sampling.repetition_penalty != 1:
        processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        expected = processor(torch.tensor([mine.token_ids]), expected)
    answer = mine.token_ids[mine.n_prompt :]
    for token in set(answer):
        expected[0, token] -= sampling.frequency_penalty * answer.count(token) + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        expected[0, token] += bias
    if len(answer) < sampling.min_tokens:
        expected[0, list(sampling.stop_token_ids)] = -torch.inf
    torch.testing.assert_close(adjusted(logits, mine), expected, atol=1e-4, rtol=1e-5)


@given(prompt=tokens, steps=st.lists(tokens, max_size=6))
def test_counts_follow_the_tokens_as_they_arrive(prompt: list[int], steps: list[list[int]]) -> None:
    mine = sequence([1, *prompt], [])
    for arrived in steps:
        mine.token_ids += arrived
        answer, counts = mine.token_ids[mine.n_prompt :], mine.token_counts
        assert sorted(counts.ids.tolist()) == sorted(set(mine.token_ids))
        assert dict(zip(counts.ids.tolist(), counts.in_answer.tolist(), strict=True)) == {
            token: answer.count(token) for token in set(mine.token_ids)
        }


def test_a_step_counts_only_the_tokens_that_arrived() -> None:
    class Counted(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    counts = TokenCounts(n_prompt=900)
    ids = Counted(range(1000))
    counts.count(ids)
    ids.append(5)
    Counted.reads = 0
    counts.count(ids)
    assert Counted.reads == 1
    assert len(counts.ids) == 1000
    assert counts.in_answer[5] == 1


def test_preempted_requests_are_penalised_as_others(tiny_llama_folder: Path) -> None:
    runs = []
    for blocks in (14, 200):
        engine = make_engine(tiny_llama_folder, blocks=blocks, prefix_cache=False)
        for index in range(4):
            fields = {"repetition_penalty": 1.4, "frequency_penalty": 0.7}
            engine.submit(request(str(index), [5 + index, 9, 17], max_tokens=16, **fields))
        runs.append((run_until_done(engine).tokens, engine.stats().preemptions))
        engine.close()
    (tight, preemptions), (roomy, none) = runs
    assert tight == roomy
    assert preemptions > none == 0


def test_a_request_without_adjustments_keeps_its_logits_bit_for_bit() -> None:
    logits = random_logits(2)
    assert torch.equal(adjusted(logits, sequence([1], [2]), sequence([1], [2], logit_bias=((3, 9.0),)))[0], logits[0])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_log_probabilities_are_those_of_a_softmax_over_all_tokens(count: int) -> None:
    logits = random_logits(3)
    expected = torch.log_softmax(logits, -1)
    for row, found in enumerate(ArrivingLogprobs(logits, torch.tensor([4, 5, 6]), [count] * 3).get()):
        assert found.token_id == 4 + row
        assert found.logprob == pytest.approx(float(expected[row, 4 + row]), abs=1e-5)
        best = expected[row].topk(count)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)
