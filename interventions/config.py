"""The configuration of an intervention as plain data, known before training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InterventionConfig:
    """The family, sites and sizes of an intervention. tied: prefix and suffix positions share their weights."""

    family: str
    layers: tuple[int, ...]
    positions: str
    rank: int
    tied: bool = True
    dropout: float = 0.0
