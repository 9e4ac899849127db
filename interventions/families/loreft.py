"""LoReFT (Wu et al. 2024, eq. 2)."""

from __future__ import annotations

from torch import Tensor, nn

from reftserve.interventions.edit import Activation, LowRankEdit, compose
from reftserve.interventions.families.base import Family, columns
from reftserve.interventions.families.orthonormal import orthonormal


class LoReFT(Family):
    """h + R^T (act(Wh + b) - Rh), R with orthonormal rows."""

    def __init__(self, hidden_size: int, rank: int, *, dropout: float = 0.0, act: str = "linear") -> None:
        super().__init__(hidden_size, rank, dropout=dropout, act=act)
        self.rotate = orthonormal(hidden_size, rank)
        self.learned_source = nn.Linear(hidden_size, rank)

    def edited(self, h: Tensor) -> Tensor:
        """The formula; R^T is `rotate.weight` [hidden, rank]."""
        Rt: Tensor = self.rotate.weight  # type: ignore[assignment]
        return h + (self.activation(self.learned_source(h)) - h @ Rt) @ Rt.T

    def lower(self) -> LowRankEdit:
        """A = W - R, U = R; with an activation, columns for act(Wh + b) and linear ones for -Rh."""
        R: Tensor = self.rotate.weight.T  # type: ignore[assignment]
        W, b = self.learned_source.weight, self.learned_source.bias
        if self.act is Activation.LINEAR:
            return columns(W - R, b, R)
        return compose([columns(W, b, R, self.act), columns(-R, b * 0, R)])
