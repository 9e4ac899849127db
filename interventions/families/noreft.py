"""NoReFT: LoReFT without orthonormality."""

from __future__ import annotations

from torch import Tensor, nn

from reftserve.interventions.edit import Activation, LowRankEdit, compose
from reftserve.interventions.families.base import Family, columns


class NoReFT(Family):
    """h + W2^T (act(W1 h + b1) - (W2 h + b2)); b2 only with `add_bias`."""

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        dropout: float = 0.0,
        act: str = "linear",
        add_bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, rank, dropout=dropout, act=act)
        self.projection = nn.Linear(hidden_size, rank, bias=add_bias)
        self.learned_source = nn.Linear(hidden_size, rank)

    def edited(self, h: Tensor) -> Tensor:
        """The formula; W2 is `projection.weight` [rank, hidden]."""
        delta: Tensor = (self.activation(self.learned_source(h)) - self.projection(h)) @ self.projection.weight
        return h + delta

    def lower(self) -> LowRankEdit:
        """A = W1 - W2, b = b1 - b2, U = W2; with an activation, two sets of columns."""
        W1, b1 = self.learned_source.weight, self.learned_source.bias
        W2 = self.projection.weight
        b2 = b1 * 0 if self.projection.bias is None else self.projection.bias
        if self.act is Activation.LINEAR:
            return columns(W1 - W2, b1 - b2, W2)
        return compose([columns(W1, b1, W2, self.act), columns(-W2, -b2, W2)])
