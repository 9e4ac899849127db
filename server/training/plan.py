"""The plan holds every decision of a training run. `recipe.py` makes it, the job stores it, training reads it alone."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from reftserve.interventions.config import InterventionConfig
from reftserve.interventions.positions import Positions


class Variant(BaseModel):
    """The fields that a trial of a sweep changes in the plan; None keeps the plan's value."""

    model_config = ConfigDict(frozen=True)

    layers: list[int] | None = None
    positions: str | None = None
    rank: int | None = None
    learning_rate: float | None = None
    dropout: float | None = None


class Plan(BaseModel):
    """A run's decisions. max_length: tokens of prompt and completion. early_stopping_epochs: without a better loss."""

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
        """The plan of each trial; without a sweep there is one."""
        return [self.varied(variant) for variant in self.sweep or [Variant()]]

    def varied(self, variant: Variant) -> Plan:
        """Return the plan of one trial."""
        return self.model_copy(update={**variant.model_dump(exclude_none=True), "sweep": []})

    @property
    def edited(self) -> tuple[Positions, ...]:
        """The positions; untied prefix and suffix are two entries."""
        positions = Positions.parse(self.positions)
        return (positions,) if self.tied else tuple(positions.split())

    @property
    def edits_prefix(self) -> bool:
        """Whether the plan edits a prompt's first tokens, so that no part of the prompt is constant in all layers."""
        return any(positions.first or positions.prompt for positions in self.edited)

    @property
    def intervention(self) -> InterventionConfig:
        """The configuration of the trained intervention."""
        return InterventionConfig(
            family=self.family,
            layers=tuple(self.layers),
            positions=self.positions,
            rank=self.rank,
            tied=self.tied,
            dropout=self.dropout,
        )

    def steps_per_epoch(self, examples: int) -> int:
        """Return the optimizer steps of one pass over `examples` examples."""
        return math.ceil(examples / self.batch_size)
