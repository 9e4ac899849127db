"""A linear layer for tests of its packed, fused and int8 forms."""

from __future__ import annotations

import torch
from torch import nn


def linear(n_in: int = 48, n_out: int = 20, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)
