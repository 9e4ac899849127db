"""A linear layer for tests of the forms that it is brought into."""

from __future__ import annotations

import torch
from torch import nn


def linear(n_in: int = 48, n_out: int = 20, *, bias: bool = True) -> nn.Linear:
    """Frozen, the same at every call."""
    torch.manual_seed(1)
    return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)
