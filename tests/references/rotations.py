"""pyreft's rotations as ours begin: the fixed square matrix of torch's parametrization is a product of reflections.

torch completes the first columns of that matrix at random, and what an optimizer step does depends on the rest of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_alike(rotate: nn.Module) -> Tensor:
    """Give a module with an orthogonal weight [hidden, rank] our fixed matrix; the reflections below its diagonal."""
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
