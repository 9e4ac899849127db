"""Give pyreft's rotations our initial completion; torch's is random, and optimizer steps depend on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_alike(rotate: nn.Module) -> Tensor:
    """Set our fixed matrix in a module with an orthogonal weight [hidden, rank]; return its reflections."""
    weight = rotate.weight.detach().clone()
    hidden, rank = weight.shape
    reflections, factors = torch.geqrf(weight)
    square = torch.cat([reflections, torch.zeros(hidden, hidden - rank)], dim=1)
    base = torch.linalg.householder_product(square, torch.cat([factors, torch.zeros(hidden - rank)]))
    parametrization = rotate.parametrizations.weight
    parametrization[0].base.copy_(base)
    parametrization.original.copy_(-torch.eye(hidden, rank) * reflections.diagonal().sgn())
    torch.testing.assert_close(rotate.weight, weight)
    return reflections.tril(-1)
