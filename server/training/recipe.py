"""From what a user asked for to a complete plan: every decision that was left open is made here.

The defaults are the paper's, moved to what small data on a small budget wants: suffix-only positions, which train
fastest and share the prefix cache in serving, at one layer in the middle, where the quick start of pyreft puts it.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from pydantic import BaseModel, ConfigDict

from reftserve.client.schemas import (
    Method,
    Range,
    ReftHyperparameters,
    ReftMethod,
    ReftSweep,
    SupervisedHyperparameters,
)
from reftserve.interventions import (
    FAMILIES,
    BaseFingerprint,
    InterventionConfig,
    Positions,
    PositionsError,
)
from reftserve.server.errors import InvalidRequest

LEARNING_RATE = 4e-3
BATCH_SIZE = 8
TARGET_STEPS = 60
EPOCHS = (2, 20)


class Variant(BaseModel):
    """What a trial of a sweep changes in the plan; None leaves it."""

    model_config = ConfigDict(frozen=True)

    layers: list[int] | None = None
    positions: str | None = None
    rank: int | None = None
    learning_rate: float | None = None
    dropout: float | None = None


class Plan(BaseModel):
    """Every decision of a training run.

    max_length: tokens of prompt and completion together. sweep: the trials, when there are several.
    early_stopping_epochs: epochs without a better validation loss; None: goes on to the end.
    """

    model_config = ConfigDict(frozen=True)

    family: str
    layers: list[int]
    positions: str
    rank: int
    dropout: float
    tied: bool
    n_epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float = 1.0
    max_length: int
    early_stopping_epochs: int | None = None
    sweep: list[Variant] = []

    @property
    def trials(self) -> list[Plan]:
        """The plan of each trial; without a sweep it is the only one."""
        changes = [variant.model_dump(exclude_none=True) for variant in self.sweep] or [{}]
        return [self.model_copy(update={**change, "sweep": []}) for change in changes]

    @property
    def edited(self) -> tuple[Positions, ...]:
        """The positions, prefix and suffix apart where they have weights of their own."""
        positions = Positions.parse(self.positions)
        return (positions,) if self.tied else tuple(positions.split())

    @property
    def edits_prefix(self) -> bool:
        """Whether a prompt's first tokens are edited, so that nothing before its end is constant in all layers."""
        return any(positions.first or positions.prompt for positions in self.edited)

    @property
    def intervention(self) -> InterventionConfig:
        """What is trained."""
        return InterventionConfig(
            family=self.family,
            layers=tuple(self.layers),
            positions=self.positions,
            rank=self.rank,
            tied=self.tied,
            dropout=self.dropout,
        )

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps that one pass over `examples` examples takes."""
        return math.ceil(examples / self.batch_size)


def make_plan(
    method: Method | None,
    legacy: SupervisedHyperparameters | None,
    base: BaseFingerprint,
    *,
    examples: int,
    max_context: int,
    seed: int = 0,
) -> Plan:
    """Resolve a job's `method` (and OpenAI's older `hyperparameters`) for a data set of `examples` rows.

    Raises InvalidRequest that names the field and what is right.
    """
    reft, hyper, rate_factor = _asked(method, legacy)
    layers = _layers(reft.layers, base.num_layers)
    batch_size = hyper.batch_size or max(1, min(BATCH_SIZE, examples // 8))
    steps_per_epoch = max(1, round(examples * 0.8 / batch_size))
    epochs = min(max(math.ceil(TARGET_STEPS / steps_per_epoch), EPOCHS[0]), EPOCHS[1])
    family = reft.family or "loreft"
    if family not in FAMILIES:
        raise _invalid("family", family, f"one of {', '.join(FAMILIES)}")
    rank = reft.rank or min(4, base.hidden_size)
    _check_rank(rank, base, "rank")
    positions = reft.positions or "l1"
    _check_positions(positions, "positions")
    max_length = hyper.max_length or min(max_context, 1024)
    if max_length > max_context:
        raise _invalid("hyperparameters.max_length", max_length, f"at most the base's context, {max_context}")
    plan = Plan(
        family=family,
        layers=layers,
        positions=positions,
        rank=rank,
        dropout=reft.dropout or 0.0,
        tied=True if reft.tied is None else reft.tied,
        n_epochs=hyper.n_epochs or epochs,
        batch_size=batch_size,
        learning_rate=(hyper.learning_rate or LEARNING_RATE) * rate_factor,
        warmup_ratio=0.1 if hyper.warmup_ratio is None else hyper.warmup_ratio,
        weight_decay=hyper.weight_decay or 0.0,
        max_length=max_length,
        early_stopping_epochs=hyper.early_stopping_epochs,
    )
    return plan if reft.sweep is None else plan.model_copy(update={"sweep": variants(reft.sweep, base, seed=seed)})


def _asked(
    method: Method | None, legacy: SupervisedHyperparameters | None
) -> tuple[ReftMethod, ReftHyperparameters, float]:
    """What the user decided, in ReFT's terms, and a factor on the learning rate."""
    if method is not None and method.type == "reft":
        if method.supervised is not None:
            raise InvalidRequest("method.supervised does not go with type 'reft'", param="method.supervised")
        reft = method.reft or ReftMethod()
        return reft, reft.hyperparameters, 1.0
    if method is not None and method.reft is not None:
        raise InvalidRequest("method.reft does not go with type 'supervised'", param="method.reft")
    knobs = (
        method.supervised.hyperparameters if method and method.supervised else legacy
    ) or SupervisedHyperparameters()
    given: dict[str, Any] = {
        name: value for name in ("n_epochs", "batch_size") if (value := getattr(knobs, name)) != "auto"
    }
    for name, value in given.items():
        if not 1 <= value <= 1000:
            raise InvalidRequest(f"{name} is {value}; expected 1 to 1000", param=f"method.supervised.{name}")
    factor = 1.0 if knobs.learning_rate_multiplier == "auto" else knobs.learning_rate_multiplier
    if not 0 < factor <= 100:
        raise InvalidRequest(
            f"learning_rate_multiplier is {factor}; expected above 0, at most 100",
            param="method.supervised.hyperparameters.learning_rate_multiplier",
        )
    return ReftMethod(), ReftHyperparameters(**given), factor


def variants(sweep: ReftSweep, base: BaseFingerprint, *, seed: int) -> list[Variant]:
    """Up to `trials` different combinations; of more, and of ranges, random ones.

    Raises InvalidRequest that names the field and what is right.
    """
    for rank in sweep.rank or ():
        _check_rank(rank, base, "sweep.rank")
    for positions in sweep.positions or ():
        _check_positions(positions, "sweep.positions")
    for rate in _bounds(sweep.learning_rate):
        if not 0 < rate <= 1:
            raise _invalid("sweep.learning_rate", rate, "above 0, at most 1")
    for dropout in _bounds(sweep.dropout):
        if not 0 <= dropout < 1:
            raise _invalid("sweep.dropout", dropout, "0 or more, below 1")
    layers = [_layers(each, base.num_layers, "sweep.layers") for each in sweep.layers] if sweep.layers else None
    given = {"layers": layers, "positions": sweep.positions, "rank": sweep.rank}
    ranges = {}
    for field in ("learning_rate", "dropout"):
        asked = getattr(sweep, field)
        if isinstance(asked, Range):
            ranges[field] = asked
        else:
            given[field] = asked
    if not ranges and not any(given.values()):
        raise InvalidRequest("the sweep varies nothing; give it at least one field", param="method.reft.sweep")
    draw = random.Random(seed)  # noqa: S311 - a choice of trials, not a secret
    lists = {field: values for field, values in given.items() if values}
    grid = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    draw.shuffle(grid)
    if ranges:  # every trial draws its own numbers, so combinations may come again
        grid = [grid[number % len(grid)] for number in range(sweep.trials)]
    return [
        Variant(**change, **{field: _drawn(draw, asked) for field, asked in ranges.items()})
        for change in grid[: sweep.trials]
    ]


def _bounds(asked: list[float] | Range | None) -> list[float]:
    return [asked.low, asked.high] if isinstance(asked, Range) else asked or []


def _drawn(draw: random.Random, asked: Range) -> float:
    if asked.log:
        return math.exp(draw.uniform(math.log(asked.low), math.log(asked.high)))
    return draw.uniform(asked.low, asked.high)


def _check_rank(rank: int, base: BaseFingerprint, field: str) -> None:
    if not 1 <= rank <= base.hidden_size:
        raise _invalid(field, rank, f"1 to the base's hidden size, {base.hidden_size}")


def _check_positions(positions: str, field: str) -> None:
    try:
        Positions.parse(positions)
    except PositionsError as cause:
        raise InvalidRequest(str(cause), param=f"method.reft.{field}") from cause


def _layers(asked: list[int] | str | None, num_layers: int, field: str = "layers") -> list[int]:
    if asked is None:
        return [num_layers // 2]
    if isinstance(asked, str):
        return list(range(num_layers))
    wrong = [layer for layer in asked if not 0 <= layer < num_layers]
    if wrong or not asked or len(set(asked)) != len(asked):
        raise _invalid(field, asked, f"different numbers from 0 to {num_layers - 1}, at least one")
    return sorted(asked)


def _invalid(field: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"method.reft.{field} is {value!r}; expected {expected}", param=f"method.reft.{field}")
