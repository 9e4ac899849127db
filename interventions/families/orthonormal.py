"""Orthonormal matrices that stay so while they are trained: torch's parametrization, with a gradient that costs less.

`torch.nn.utils.parametrizations.orthogonal` multiplies a fixed square matrix by a product of Householder reflections
H_1 ... H_rank of the parameter's columns, and differentiates it reflection by reflection: 1.9 ms for [576, 4]. Here the
product is in its compact form (Schreiber and Van Loan 1989),

    H_1 ... H_rank = I - V T V^T,    T^-1 = striu(V^T V) + diag(V^T V) / 2       V [hidden, rank] unit lower triangular

so a few small products give the value, and autograd the gradient. Parameters and buffers keep torch's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class Householder(nn.Module):
    """base @ H_1 ... H_rank: of a parameter [hidden, rank], rank < hidden, a matrix with orthonormal columns.

    Below the parameter's diagonal stand the reflections; on it, never changed, the columns' signs.
    """

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", None)

    def forward(self, parameter: Tensor) -> Tensor:
        """[hidden, rank] -> [hidden, rank]."""
        rank = parameter.shape[1]
        eye = torch.eye(*parameter.shape, dtype=parameter.dtype, device=parameter.device)
        V = parameter.tril(-1) + eye
        gram = V.T @ V
        inverse = gram.triu(1) + torch.diag(gram.diagonal() / 2)
        first = eye - V @ torch.linalg.solve_triangular(inverse, V[:rank].T, upper=True)
        weight: Tensor = self.base @ (first * parameter.detach().diagonal())
        return weight

    @torch.no_grad()
    def right_inverse(self, matrix: Tensor) -> Tensor:
        """The parameter of a matrix [hidden, rank] with orthonormal columns, completed at random to `base`."""
        hidden, rank = matrix.shape
        rest = torch.randn(hidden, hidden - rank, dtype=matrix.dtype, device=matrix.device)
        reflections, tau = torch.geqrf(torch.cat([matrix, rest], dim=1))
        self.base = torch.linalg.householder_product(reflections, tau) * reflections.diagonal().sgn()
        return -torch.eye(hidden, rank, dtype=matrix.dtype, device=matrix.device)


def orthonormal(hidden_size: int, rank: int) -> nn.Module:
    """R, with orthonormal rows, as the paper has it: `.weight` [hidden, rank] stays orthonormal while trained."""
    rotate = nn.Linear(hidden_size, rank, bias=False)
    rotate.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden_size, rank)))
    if rank == hidden_size:  # torch's form for square matrices is another
        return nn.utils.parametrizations.orthogonal(rotate)
    register_parametrization(rotate, "weight", Householder(), unsafe=True)
    return rotate
