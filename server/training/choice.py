"""Which of several trials a sweep takes: of those within one standard error of the best, the cheapest.

A validation loss is an estimate from few examples. Where two trials differ by less than the error of that estimate, the
rounding of a processor decides which loss is lower, and the same job published an intervention of 14,000 parameters on
one machine and of 277,000 on another. So trials within the error count as equals, and what they cost decides (the
one-standard-error rule, Breiman et al. 1984):

    difference   the trial's loss a token minus the best trial's, on the same examples
    error        the standard error of that difference, paired by example: what is hard for both trials cancels out
    equals       all trials whose difference is at most its error
    chosen       of the equals the one of the lowest cost, then of the fewest parameters, then the first

The cost is that of the positions, in training and in serving:

    cost  positions         what they cost
    0     l1, l7            trains on a prompt's end against kept activations, shares the base's cached prefix
    1     f7, f7+l7         computes every prompt in every step, shares no cached prefix
    2     prompt            the same, and edits every row of a prompt
    3     generated, all    edits every token that is decoded

The loss of a trial is the lowest that it has reached, in whatever epoch. The loss of its newest weights goes up and
down from epoch to epoch by more than the error: a trial of the demo had 0.202 after 57 steps and 0.254 after 76.

Whom a sweep drops on the way is chosen in the same manner: trials are ranked by choosing one, then one of the rest, and
so on, and the last are dropped. A trial that is clearly worse than the best stands behind all of its equals, and of
equals the dearest stands last.
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
    """What a trial is compared by where losses do not decide. positions: the cost in the module's table."""

    positions: int
    parameters: int

    @classmethod
    def of(cls, edited: Sequence[Positions], parameters: int) -> Cost:
        """Return the cost of an intervention that edits these positions."""
        return cls(max(_positions_cost(positions) for positions in edited), parameters)


@dataclass(frozen=True, eq=False)
class Contender:
    """A validated trial. losses: [examples], sums over an example's tokens, when the trial's loss was lowest."""

    number: int
    losses: NDArray[np.float64]
    cost: Cost


class Choice(BaseModel):
    """Why a trial was chosen, for the job's plan, in whose sweep the trials have their numbers.

    step: the optimizer step after which the trials were compared. ranked: those that were compared, in their order, of
    which the first `kept` went on. best: the trial of the lowest validation loss. chosen: the trial that was ranked
    first. difference: the chosen trial's loss a token minus the best one's. standard_error: of that difference; None
    with a single example, from which no error can be told.
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
    """Order trials: the one that is chosen of all, the one that is chosen of the rest, and so on.

    tokens: [examples], the completion tokens of each example.
    """
    left, ranked = list(contenders), list[Contender]()
    while left:
        _, chosen = _choose(left, tokens)
        ranked.append(chosen)
        left.remove(chosen)
    return ranked


def choose(contenders: Sequence[Contender], tokens: NDArray[np.int64]) -> Contender:
    """Return the trial that the module's rule takes of at least one. tokens: as of `rank`."""
    return _choose(contenders, tokens)[1]


def explain(contenders: Sequence[Contender], tokens: NDArray[np.int64], *, step: int, kept: int) -> Choice:
    """Record why the trials are ranked as they are, for the job's plan. tokens: as of `rank`."""
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
    """Return the trial of the lowest loss, and the one that is chosen."""
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
