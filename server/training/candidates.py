"""What the recipe tries where a user leaves it open: a few candidates, and for how long, by the size of the data.

They begin at the paper's recipes (one middle layer at `l1`; all layers at a lower rate) and were chosen by runs by hand
on 200 rows of SST-2 and TREC, one seed; `benchmarks/recipes.py` compares them with a grid. A candidate that edits no
prefix computes a prompt once for all epochs and then little more than its answers; one that does computes everything
again in every step. So the latter stand in the list only as long as that is a small job.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from reftserve.client.schemas import DataReport
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.training.plan import Plan, Variant

STEPS = 150  # optimizer steps that small data gets
EPOCHS = (3, 12)  # at least and at most
ANSWER_TOKENS = 40_000  # of all epochs together, before there are fewer of them
PREFIX_TOKENS = 60_000  # of all epochs together: up to here prompts may be computed again in every step


@dataclass(frozen=True)
class DataSize:
    """What the recipe looks at: how many examples train, and the tokens of a typical one."""

    examples: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, report: DataReport) -> DataSize:
        """The medians of the training file."""
        training = report.training
        return cls(report.splits.train, training.prompt_tokens.p50, training.completion_tokens.p50)


def epochs(size: DataSize, batch_size: int) -> int:
    """Passes over the data: many over little data, few over long answers."""
    for_steps = math.ceil(STEPS / math.ceil(size.examples / batch_size))
    affordable = ANSWER_TOKENS // (size.examples * size.completion_tokens)
    fewest, most = EPOCHS
    return max(fewest, min(for_steps, affordable, most))


class Candidate(NamedTuple):
    """What is trained where, and how fast."""

    layers: list[int]
    positions: str
    rank: int
    learning_rate: float


def known_good(base: BaseFingerprint) -> list[Candidate]:
    """All candidates, whatever they cost; the first is what is trained when there is no search."""
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
    """Different variants of a plan, of which there is at least one.

    given: fields that the user decided, which all of them keep. rate_factor: on every learning rate.
    """
    found: list[Variant] = []
    for known in known_good(base):
        rate = known.learning_rate * rate_factor
        variant = Variant(**{**known._asdict(), **dict.fromkeys(given), "learning_rate": rate})
        is_affordable = not plan.varied(variant).edits_prefix or _prefix_tokens(plan, size) <= PREFIX_TOKENS
        if not found or (variant not in found and is_affordable):
            found.append(variant)
    return found


def _spread(count: int, base: BaseFingerprint) -> list[int]:
    """So many layers at equal distances, the ends left out; fewer where the base has hardly more."""
    return sorted({round(number / (count + 1) * (base.num_layers - 1)) for number in range(1, count + 1)})


def _prefix_tokens(plan: Plan, size: DataSize) -> int:
    return plan.n_epochs * size.examples * (size.prompt_tokens + size.completion_tokens)
