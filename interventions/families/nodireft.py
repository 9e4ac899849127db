"""NodiReFT: DiReFT without orthonormality."""

from __future__ import annotations

from torch import Tensor, nn

from reftserve.interventions.edit import LowRankEdit
from reftserve.interventions.families.base import Family, columns


class NodiReFT(Family):
    """h + W2^T (W1 h + b1)."""

    def __init__(self, hidden_size: int, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__(hidden_size, rank, dropout=dropout)
        self.projection = nn.Linear(hidden_size, rank, bias=False)
        self.learned_source = nn.Linear(hidden_size, rank)

    def edited(self, h: Tensor) -> Tensor:
        """Apply the formula; W2 is `projection.weight` [rank, hidden]."""
        delta: Tensor = self.learned_source(h) @ self.projection.weight
        return h + delta

    def lower(self) -> LowRankEdit:
        """Return the edit with A = W1, U = W2."""
        source = self.learned_source
        return columns(source.weight, source.bias, self.projection.weight)
