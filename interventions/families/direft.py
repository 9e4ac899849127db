"""DiReFT: LoReFT without subtracting the projection."""

from __future__ import annotations

from torch import Tensor, nn

from reftserve.interventions.edit import LowRankEdit
from reftserve.interventions.families.base import Family, columns
from reftserve.interventions.families.orthonormal import orthonormal


class DiReFT(Family):
    """h + R^T (Wh + b), R with orthonormal rows."""

    def __init__(self, hidden_size: int, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__(hidden_size, rank, dropout=dropout)
        self.rotate = orthonormal(hidden_size, rank)
        self.learned_source = nn.Linear(hidden_size, rank)

    def edited(self, h: Tensor) -> Tensor:
        """Apply the formula; R^T is `rotate.weight` [hidden, rank]."""
        Rt: Tensor = self.rotate.weight  # type: ignore[assignment]
        delta: Tensor = self.learned_source(h) @ Rt.T
        return h + delta

    def lower(self) -> LowRankEdit:
        """Return the edit with A = W, U = R."""
        R: Tensor = self.rotate.weight.T  # type: ignore[assignment]
        return columns(self.learned_source.weight, self.learned_source.bias, R)
