"""From what a user asked for to a complete plan: every decision that was left open is made here.

The defaults are the paper's, moved to what small data on a small budget wants: suffix-only positions, which train
fastest and share the prefix cache in serving, at one layer in the middle, where the quick start of pyreft puts it.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from reftserve.client.schemas import Method, ReftHyperparameters, ReftMethod, SupervisedHyperparameters
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


class Plan(BaseModel):
    """Every decision of a training run. max_length: tokens of prompt and completion together."""

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
    max_length: int

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
    if reft.rank is not None and reft.rank > base.hidden_size:
        raise _invalid("rank", reft.rank, f"at most the base's hidden size, {base.hidden_size}")
    positions = reft.positions or "l1"
    try:
        Positions.parse(positions)
    except PositionsError as cause:
        raise InvalidRequest(str(cause), param="method.reft.positions") from cause
    max_length = hyper.max_length or min(max_context, 1024)
    if max_length > max_context:
        raise _invalid("hyperparameters.max_length", max_length, f"at most the base's context, {max_context}")
    return Plan(
        family=family,
        layers=layers,
        positions=positions,
        rank=reft.rank or min(4, base.hidden_size),
        dropout=reft.dropout or 0.0,
        tied=True if reft.tied is None else reft.tied,
        n_epochs=hyper.n_epochs or epochs,
        batch_size=batch_size,
        learning_rate=(hyper.learning_rate or LEARNING_RATE) * rate_factor,
        warmup_ratio=0.1 if hyper.warmup_ratio is None else hyper.warmup_ratio,
        weight_decay=hyper.weight_decay or 0.0,
        max_length=max_length,
    )


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


def _layers(asked: list[int] | str | None, num_layers: int) -> list[int]:
    if asked is None:
        return [num_layers // 2]
    if isinstance(asked, str):
        return list(range(num_layers))
    wrong = [layer for layer in asked if not 0 <= layer < num_layers]
    if wrong or not asked or len(set(asked)) != len(asked):
        raise _invalid("layers", asked, f"different numbers from 0 to {num_layers - 1}, at least one")
    return sorted(asked)


def _invalid(field: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"method.reft.{field} is {value!r}; expected {expected}", param=f"method.reft.{field}")
