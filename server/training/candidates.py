"""Candidates: the few settings that the recipe tries for open decisions, and the number of epochs for a data size.

The candidates start from the paper's recipes (one middle layer at `l1`; all layers at a lower rate). Manual runs on 200
rows of SST-2 and TREC with one seed selected them; `benchmarks/recipes.py` compares them with a grid. A candidate that
edits the prefix recomputes every prompt in every step instead of once, so it is tried only on small data.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from reftserve.client.schemas import DataReport
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.training.plan import Plan, Variant

STEPS = 150  # optimizer steps on small data
EPOCHS = (3, 12)  # minimum and maximum
ANSWER_TOKENS = 40_000  # summed over all epochs; more of them mean fewer epochs
PREFIX_TOKENS = 60_000  # summed over all epochs; more of them exclude candidates that edit the prefix


@dataclass(frozen=True)
class DataSize:
    """The size of the data: the number of training examples, and the tokens of a typical one."""

    examples: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, report: DataReport) -> DataSize:
        """Take the medians of the training file."""
        training = report.training
        return cls(report.splits.train, training.prompt_tokens.p50, training.completion_tokens.p50)


def epochs(size: DataSize, batch_size: int) -> int:
    """Return the number of epochs: many for little data, few for long answers."""
    for_steps = math.ceil(STEPS / math.ceil(size.examples / batch_size))
    affordable = ANSWER_TOKENS // (size.examples * size.completion_tokens)
    fewest, most = EPOCHS
    return max(fewest, min(for_steps, affordable, most))


class Candidate(NamedTuple):
    """Layers, positions, rank and learning rate of an intervention."""

    layers: list[int]
    positions: str
    rank: int
    learning_rate: float


def known_good(base: BaseFingerprint) -> list[Candidate]:
    """Return all candidates, whatever their cost; a run without a search takes the first."""
    everywhere = list(range(base.num_layers))
    found = (
        Candidate(_spread(4, base), "l1", 8, 2e-3),
        Candidate(everywhere, "l1", 4, 9e-4),
        Candidate(everywhere, "l1", 8, 9e-4),
        Candidate(_spread(3, base), "l1", 4, 4e-3),
        Candidate(_spread(4, base), "prompt", 16, 1e-3),
    )
    return [each._replace(rank=min(each.rank, base.hidden_size)) for each in found]


def candidates(
    plan: Plan, size: DataSize, base: BaseFingerprint, *, given: Collection[str], rate_factor: float = 1.0
) -> list[Variant]:
    """Return different variants of a plan, at least one; all keep its `given` fields. rate_factor scales the rates."""
    found: list[Variant] = []
    for known in known_good(base):
        rate = known.learning_rate * rate_factor
        variant = Variant(**{**known._asdict(), **dict.fromkeys(given), "learning_rate": rate})
        is_affordable = not plan.varied(variant).edits_prefix or _prefix_tokens(plan, size) <= PREFIX_TOKENS
        if not found or (variant not in found and is_affordable):
            found.append(variant)
    return found


def _spread(count: int, base: BaseFingerprint) -> list[int]:
    """Return `count` layers at equal distances, without the two ends; fewer in a base with few layers."""
    return sorted({round(number / (count + 1) * (base.num_layers - 1)) for number in range(1, count + 1)})


def _prefix_tokens(plan: Plan, size: DataSize) -> int:
    return plan.n_epochs * size.examples * (size.prompt_tokens + size.completion_tokens)
