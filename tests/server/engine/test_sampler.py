"""Sampling: each row uses its own parameters and is independent of the other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reftserve.server.engine import sampler
from reftserve.server.engine.messages import SamplingParams
from reftserve.server.engine.sampler import sample, uniforms


def logits(rows: int, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def params(**fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=1, **fields)  # type: ignore[arg-type]


sampled = st.builds(
    lambda t, p, k, m, s: params(temperature=t, top_p=p, top_k=k, min_p=m, seed=s),
    st.floats(0, 3),
    st.floats(0.05, 1),
    st.integers(0, 60),
    st.floats(0, 1),
    st.integers(-(2**63), 2**63 - 1),
)


@given(mates=st.lists(sampled, max_size=5), mine=sampled, position=st.integers(0, 10000))
def test_a_row_draws_its_token_independently_of_the_other_rows(
    mates: list[SamplingParams], mine: SamplingParams, position: int
) -> None:
    rows = logits(len(mates) + 1)
    alone = sample(rows[-1:], [mine], [position]).tolist()
    together = sample(rows, [*mates, mine], [*range(len(mates)), position]).tolist()
    assert together[-1] == alone[0]


@pytest.mark.parametrize("fields", [{}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}])
def test_without_limits_even_the_least_likely_token_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, float]
) -> None:
    # In float32 the running sum of so many probabilities reaches 1 before the end.
    row = logits(1, vocabulary=50_000)
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, positions: np.full(len(seeds), np.nextafter(1, 0)))
    assert sample(row, [params(temperature=1.0, **fields)], [0]).tolist() == row.argmin(-1).tolist()
    limited = sample(row, [params(temperature=1.0, top_p=0.999)], [0]).tolist()
    assert limited != row.argmin(-1).tolist()


def test_temperature_zero_is_greedy() -> None:
    rows = logits(4)
    assert sample(rows, [params()] * 4, [0] * 4).tolist() == rows.argmax(-1).tolist()


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    rows = logits(4) * 1e4
    assert sample(rows, [params(temperature=1e-6)] * 4, [0] * 4).tolist() == rows.argmax(-1).tolist()


def test_tokens_come_with_the_probability_that_softmax_gives_them() -> None:
    row = logits(1, vocabulary=8)
    draws = 20000
    tokens = sample(
        row.expand(draws, -1), [params(temperature=1.0, seed=i) for i in range(draws)], [3] * draws
    ).tolist()
    frequencies = np.bincount(tokens, minlength=8) / draws
    np.testing.assert_allclose(frequencies, torch.softmax(row[0], -1).numpy(), atol=0.015)


def drawn(row: torch.Tensor, **fields: object) -> set[int]:
    tokens = sample(
        row.expand(500, -1), [params(temperature=1.5, seed=i, **fields) for i in range(500)], [0] * 500
    ).tolist()
    return set(tokens)


def test_top_k_keeps_the_k_best() -> None:
    row = logits(1)
    assert drawn(row, top_k=3) <= set(row[0].topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])) * 1.5  # the temperature cancels the factor
    assert drawn(row, top_p=0.69) == {0, 1}
    assert drawn(row, top_p=0.71) == {0, 1, 2}
    assert drawn(row, top_p=0.01) == {0}


def test_min_p_drops_tokens_far_below_the_best() -> None:
    row = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])) * 1.5
    assert drawn(row, min_p=0.5) == {0, 1}
    assert drawn(row, min_p=1.0) == {0}


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    numbers = uniforms([0] * 10000 + [1] * 10000, [*range(10000)] * 2)
    assert len(set(numbers.tolist())) == 20000
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, bins=10)[0] / 20000, 0.1, atol=0.01)
