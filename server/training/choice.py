"""The choice among a sweep's trials: the cheapest of those within one standard error of the best.

A validation loss is an estimate from few examples. Without this rule, rounding chose among near-equal trials: the same
job published 14,000 parameters on one machine and 277,000 on another (one-standard-error rule, Breiman et al. 1984).

    difference   the trial's loss per token minus the best trial's, on the same examples
    error        the standard error of the difference, paired by example: difficulty common to both trials cancels
    chosen       the cheapest trial whose difference is at most its error, then of fewest parameters, then the first

    cost  positions         effect in training and serving
    0     l1, l7            trains on a prompt's end against kept activations, shares the base's cached prefix
    1     f7, f7+l7         computes every prompt in every step, shares no cached prefix
    2     prompt            the same, and edits every row of a prompt
    3     generated, all    edits every decoded token

A trial's loss is the lowest of all its epochs, because the newest weights' loss varies by more than the error: a demo's
trial had 0.202 after 57 steps and 0.254 after 76. Halvings drop the last trials by rank (`rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from reftserve.interventions import Positions
from reftserve.server.training.scores import paired_difference


class Cost(NamedTuple):
    """The cost of a trial, which decides among equals. positions: the cost in the module's table."""

    positions: int
    parameters: int

    @classmethod
    def of(cls, edited: Sequence[Positions], parameters: int) -> Cost:
        """Return the cost of an intervention that edits these positions."""
        return cls(max(_positions_cost(positions) for positions in edited), parameters)


@dataclass(frozen=True, eq=False)
class Contender:
    """A validated trial. losses: [examples], sums over an example's tokens, from when the trial's loss was lowest."""

    number: int
    losses: NDArray[np.float64]
    cost: Cost


class Choice(BaseModel):
    """The record of a choice, stored in the job's plan; trials have their numbers in the plan's sweep.

    The first `kept` of `ranked` went on. difference, standard_error: of `chosen` minus `best`, in loss per token.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    ranked: list[int]
    kept: int
    best: int
    chosen: int
    difference: float
    standard_error: float | None
    reason: str


def rank(contenders: Sequence[Contender], tokens: NDArray[np.int64]) -> list[Contender]:
    """Order trials: the choice among all, then among the rest, and so on. tokens: of each completion, [examples]."""
    left, ranked = list(contenders), list[Contender]()
    while left:
        _, chosen = _choose(left, tokens)
        ranked.append(chosen)
        left.remove(chosen)
    return ranked


def choose(contenders: Sequence[Contender], tokens: NDArray[np.int64]) -> Contender:
    """Return the trial that the module's rule chooses. contenders: at least one. tokens: as for `rank`."""
    return _choose(contenders, tokens)[1]


def explain(contenders: Sequence[Contender], tokens: NDArray[np.int64], *, step: int, kept: int) -> Choice:
    """Return the record of the trials' ranking. tokens: as for `rank`."""
    best, chosen = _choose(contenders, tokens)
    difference, error = paired_difference(chosen.losses, best.losses, tokens)
    return Choice(
        step=step,
        ranked=[each.number for each in rank(contenders, tokens)],
        kept=kept,
        best=best.number,
        chosen=chosen.number,
        difference=difference,
        standard_error=error,
        reason=_reason(best, chosen, error),
    )


def _choose(contenders: Sequence[Contender], tokens: NDArray[np.int64]) -> tuple[Contender, Contender]:
    best = min(contenders, key=lambda each: (each.losses.sum(), each.number))
    equals = [each for each in contenders if _is_within_error(each, best, tokens)]
    return best, min(equals, key=lambda each: (each.cost, each.number))


def _is_within_error(one: Contender, best: Contender, tokens: NDArray[np.int64]) -> bool:
    difference, error = paired_difference(one.losses, best.losses, tokens)
    return error is None or difference <= error


def _reason(best: Contender, chosen: Contender, error: float | None) -> str:
    if chosen is best:
        return f"trial {best.number} has the lowest validation loss, and no cheaper trial is within one standard error"
    within = (
        "there is one validation example, too few to tell trials apart"
        if error is None
        else (
            f"the validation loss of trial {chosen.number} is within one standard error of the lowest, "
            f"that of trial {best.number}"
        )
    )
    if chosen.cost.positions < best.cost.positions:
        return f"{within}, and its positions cost less"
    if chosen.cost < best.cost:
        return f"{within}, and it has {chosen.cost.parameters:,} parameters instead of {best.cost.parameters:,}"
    return f"{within}, and it comes first among trials of one cost"


def _positions_cost(positions: Positions) -> int:
    if positions.generated:
        return 3
    return 2 if positions.prompt else 1 if positions.first else 0
