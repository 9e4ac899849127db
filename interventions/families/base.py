"""The base class of families: a trainable module over hidden states that lowers to a canonical edit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from reftserve.interventions.edit import Activation, LowRankEdit


class Family(nn.Module, ABC):
    """A trainable edit at one layer and position, in float32. dropout: of the edited hidden state, as in pyreft."""

    def __init__(self, hidden_size: int, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.rank = rank
        self.dropout = nn.Dropout(dropout)

    @abstractmethod
    def edited(self, h: Tensor) -> Tensor:
        """Return the edited hidden states [rows, hidden] by the family's formula, in float32."""

    @abstractmethod
    def lower(self) -> LowRankEdit:
        """Return the canonical edit with the same effect, detached from training."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the edited hidden states [rows, hidden] in hidden's dtype."""
        edited: Tensor = self.dropout(self.edited(hidden.float()))
        return edited.to(hidden.dtype)


@torch.no_grad()
def columns(A: Tensor, b: Tensor, U: Tensor) -> LowRankEdit:
    """Return the linear edit of scale 1 with these columns, detached from training."""
    rank = A.shape[0]
    return LowRankEdit(
        A=A.detach().float().contiguous().clone(),
        b=b.detach().float().clone(),
        U=U.detach().float().contiguous().clone(),
        act=torch.full((rank,), Activation.LINEAR, dtype=torch.int8, device=A.device),
        scale=torch.ones(rank, device=A.device),
    )
