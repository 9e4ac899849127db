"""ConsReFT: LoReFT with a constant instead of the learned source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reftserve.interventions.edit import LowRankEdit
from reftserve.interventions.families.base import Family, columns
from reftserve.interventions.families.orthonormal import orthonormal


class ConsReFT(Family):
    """h + R^T (b - Rh), R with orthonormal rows."""

    def __init__(self, hidden_size: int, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__(hidden_size, rank, dropout=dropout)
        self.rotate = orthonormal(hidden_size, rank)
        self.learned_source = nn.Parameter(torch.rand(rank))

    def edited(self, h: Tensor) -> Tensor:
        """Apply the formula; R^T is `rotate.weight` [hidden, rank]."""
        Rt: Tensor = self.rotate.weight  # type: ignore[assignment]
        return h + (self.learned_source - h @ Rt) @ Rt.T

    def lower(self) -> LowRankEdit:
        """Return the edit with A = -R, b, U = R."""
        R: Tensor = self.rotate.weight.T  # type: ignore[assignment]
        return columns(-R, self.learned_source, R)
