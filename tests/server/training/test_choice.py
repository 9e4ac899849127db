"""The choice among trials: the cheapest within one standard error of the best, under any processor's rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reftserve.interventions import Positions
from reftserve.server.training.choice import Contender, Cost, choose, explain, rank
from reftserve.server.training.scores import paired_difference

EXAMPLES = 30
TOKENS = np.full(EXAMPLES, 2)
CHEAP, MIDDLE, DEAR = Cost(0, 14_000), Cost(0, 37_000), Cost(1, 9_000)


def trials(*losses: NDArray[np.float64], costs: Sequence[Cost] = (DEAR, MIDDLE, CHEAP)) -> list[Contender]:
    return [Contender(number, each, cost) for number, (each, cost) in enumerate(zip(losses, costs, strict=False))]


def uneven(seed: int, examples: int = EXAMPLES) -> NDArray[np.float64]:
    return np.random.default_rng(seed).lognormal(-1.5, 1.0, examples)


def deviations(seed: int, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return another trial's random differences: about a fifth of each loss, with sum 0."""
    found = losses * np.random.default_rng(seed).normal(0, 0.2, len(losses))
    return np.asarray(found - losses * found.sum() / losses.sum())


def rounded(contenders: Sequence[Contender], seed: int, relative: float) -> list[Contender]:
    draw = np.random.default_rng(seed)
    return [
        replace(each, losses=each.losses * (1 + draw.uniform(-relative, relative, len(each.losses))))
        for each in contenders
    ]


def test_rounding_changes_the_best_trial_but_never_the_chosen_one() -> None:
    losses = uneven(1)
    close = trials(*(losses + deviations(seed, losses) for seed in (2, 3, 4)))
    seen = [explain(rounded(close, seed, 1e-3), TOKENS, step=1, kept=1) for seed in range(200)]
    assert {choice.best for choice in seen} == {0, 1, 2}, "the lowest loss would publish any of them"
    assert {choice.chosen for choice in seen} == {2}
    assert {tuple(choice.ranked) for choice in seen} == {(2, 1, 0)}, "nor does it change which is dropped"


@given(
    seed=st.integers(0, 2**32),
    examples=st.integers(16, 200),
    apart=st.lists(st.sampled_from([0.0, 0.7, 1.5, 4.0]), min_size=1, max_size=8).filter(lambda found: 0.0 in found),
    costs=st.permutations([Cost(positions, size) for positions in (0, 1) for size in (1, 2, 3, 4)]),
    relative=st.floats(1e-4, 1e-3),
)
def test_every_processor_chooses_the_cheapest_of_the_close_trials(
    seed: int, examples: int, apart: list[float], costs: list[Cost], relative: float
) -> None:
    losses = np.random.default_rng(seed).uniform(0.05, 1.0, examples)
    tokens = np.random.default_rng(seed).integers(1, 4, examples)
    found = [(1 + offset) * (losses + deviations(seed + number + 1, losses)) for number, offset in enumerate(apart)]
    contenders = trials(*found, costs=costs)
    close = sorted((n for n, offset in enumerate(apart) if offset == 0.0), key=lambda number: costs[number])
    for each in (contenders, rounded(contenders, seed, relative)):
        assert [chosen.number for chosen in rank(each, tokens)[: len(close)]] == close


def steady_choice(contenders: Sequence[Contender], relative: float) -> int | None:
    """Return the choice that rounding cannot change; None if a difference almost equals its error."""
    slack = 4 * relative * max(each.losses.sum() for each in contenders) / TOKENS.sum()
    lowest = min(each.losses.sum() for each in contenders) / TOKENS.sum()
    possible_best = [each for each in contenders if each.losses.sum() / TOKENS.sum() <= lowest + slack]
    choices = set()
    for best in possible_best:
        pairs = [
            (each, *paired_difference(each.losses, best.losses, TOKENS)) for each in contenders if each is not best
        ]
        if any(abs(difference - (error or 0.0)) <= slack for _, difference, error in pairs):
            return None
        equals = [best, *(each for each, difference, error in pairs if difference <= (error or 0.0))]
        choices.add(min(equals, key=lambda each: (each.cost, each.number)).number)
    return choices.pop() if len(choices) == 1 else None


@given(seed=st.integers(0, 2**32), spread=st.floats(0.0, 0.5), relative=st.floats(1e-4, 1e-3))
def test_rounding_changes_the_choice_only_if_a_difference_almost_equals_its_error(
    seed: int, spread: float, relative: float
) -> None:
    losses, draw = uneven(seed), np.random.default_rng(seed)
    found = [losses * (1 + draw.uniform(0, spread)) + deviations(seed + number, losses) for number in range(3)]
    contenders = trials(*(np.abs(each) for each in found))
    expected = steady_choice(contenders, relative)
    assume(expected is not None)
    assert choose(contenders, TOKENS).number == expected
    assert choose(rounded(contenders, seed, relative), TOKENS).number == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_clearly_better_expensive_trial_wins(seed: int) -> None:
    losses = uneven(1)
    found = trials(0.5 * losses, losses + deviations(2, losses), losses + deviations(3, losses))
    choice = explain(rounded(found, seed, 1e-3), TOKENS, step=1, kept=1)
    assert (choice.best, choice.chosen, choice.difference) == (0, 0, 0.0)
    assert "no cheaper trial is within one standard error" in choice.reason


def test_the_error_is_that_of_the_paired_difference_not_of_one_trial() -> None:
    hard_for_both = uneven(1)
    own_error = float(hard_for_both.std()) / EXAMPLES**0.5 / 2
    worse_everywhere = hard_for_both + 0.2 * own_error
    assert choose(trials(hard_for_both, worse_everywhere), TOKENS).number == 0, "one error of its own would not tell"


def test_a_paired_difference_is_a_mean_over_tokens_with_its_standard_error() -> None:
    one, other, tokens = np.array([3.0, 5.0, 1.0]), np.array([1.0, 4.0, 2.0]), np.array([2, 2, 2])
    difference, error = paired_difference(one, other, tokens)
    assert difference == pytest.approx(2 / 6)
    residuals = np.array([2.0, 1.0, -1.0]) - 2 / 3
    assert error == pytest.approx(np.sqrt((residuals**2).sum()) / 6)
    assert paired_difference(one[:1], other[:1], tokens[:1]) == (1.0, None)


def test_positions_cost_more_without_a_shared_prefix_and_for_every_edited_token() -> None:
    notation = ["l1", "f7+l7", "prompt", "generated"]
    costs = [Cost.of([Positions.parse(each)], 10 - number).positions for number, each in enumerate(notation)]
    assert costs == [0, 1, 2, 3]
    assert Cost.of([Positions.parse("l4")], 1) == Cost.of([Positions.parse("l1")], 1)
    assert Cost.of([Positions.parse("all")], 1) == Cost.of([Positions.parse("generated")], 1)
    assert Cost.of(Positions.parse("f7+l7").split(), 1) == Cost.of([Positions.parse("f7+l7")], 1), "untied"


def test_the_choice_among_equals_is_the_smaller_then_the_first_with_that_reason() -> None:
    losses = uneven(1)
    found = [losses + deviations(seed, losses) for seed in (2, 3)]
    best_last = [found[0] * 1.0001, found[1]]
    for costs, chosen, reason in (
        ((Cost(0, 5), Cost(1, 1)), 0, "its positions cost less"),
        ((Cost(0, 5000), Cost(0, 70_000)), 0, "it has 5,000 parameters instead of 70,000"),
        ((Cost(0, 5), Cost(0, 5)), 0, "it comes first among trials of one cost"),
    ):
        choice = explain(trials(*best_last, costs=costs), TOKENS, step=7, kept=1)
        assert (choice.step, choice.best, choice.chosen) == (7, 1, chosen)
        assert 0 < choice.difference <= (choice.standard_error or 0.0)
        assert reason in choice.reason


def test_one_validation_example_cannot_distinguish_trials() -> None:
    choice = explain(trials(np.array([0.1]), np.array([0.2]), np.array([9.0])), np.array([2]), step=1, kept=1)
    assert (choice.chosen, choice.standard_error) == (2, None)
    assert "one validation example" in choice.reason
