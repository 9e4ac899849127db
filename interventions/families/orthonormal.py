"""Orthonormal matrices that stay so while they are trained: torch's parametrization in a small and cheaper form.

`torch.nn.utils.parametrizations.orthogonal` multiplies a fixed matrix [hidden, hidden] by a product of Householder
reflections H_1 ... H_rank of the parameter's columns, and differentiates it reflection by reflection: 1.9 ms for
[576, 4]. Here the product is in its compact form (Schreiber and Van Loan 1989),

    H_1 ... H_rank = I - V T V^T,    T^-1 = striu(V^T V) + diag(V^T V) / 2       V [hidden, rank] unit lower triangular

so a few small products give the value, and autograd the gradient; and the fixed matrix is such a product itself, which
is all that a matrix needs that has given first columns. Parameters and buffers have torch's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class Reflections:
    """H_1 ... H_rank, of what stands below the diagonal of a matrix [hidden, rank]."""

    def __init__(self, columns: Tensor) -> None:
        self.eye = torch.eye(*columns.shape, dtype=columns.dtype, device=columns.device)
        self._V = columns.tril(-1) + self.eye
        gram = self._V.T @ self._V
        self._inverse = gram.triu(1) + torch.diag(gram.diagonal() / 2)

    def of(self, rows: Tensor) -> Tensor:
        """Their product with rows [hidden, rank]."""
        weights = torch.linalg.solve_triangular(self._inverse, self._V.T @ rows, upper=True)
        product: Tensor = rows - self._V @ weights
        return product


class Householder(nn.Module):
    """base @ H_1 ... H_rank: of a parameter [hidden, rank], rank < hidden, a matrix with orthonormal columns.

    Below the parameter's diagonal stand the reflections; on it, never changed, the columns' signs. base [hidden, rank]:
    the reflections that make up the fixed matrix, below its diagonal too.
    """

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", None)
        self._constant: tuple[Tensor, int, Reflections] | None = None

    def forward(self, parameter: Tensor) -> Tensor:
        """[hidden, rank] -> [hidden, rank]."""
        base = self._base_reflections()
        return base.of(Reflections(parameter).of(base.eye) * parameter.detach().diagonal())

    @torch.no_grad()
    def right_inverse(self, matrix: Tensor) -> Tensor:
        """The parameter of a matrix [hidden, rank] with orthonormal columns: the base's own, but for signs."""
        self.base = torch.geqrf(matrix)[0].tril(-1)
        base = Reflections(self.base)
        # The parameter's own reflections, of nothing below its diagonal, turn the sign of each column.
        return -base.eye * (base.of(base.eye) * matrix).sum(dim=0).sgn()

    def _base_reflections(self) -> Reflections:
        """The base's, made anew only when it is another tensor or was written to, as when a checkpoint is loaded."""
        base, version = self.base, self.base._version
        if self._constant is None or self._constant[0] is not base or self._constant[1] != version:
            self._constant = base, version, Reflections(base)
        return self._constant[2]


def orthonormal(hidden_size: int, rank: int) -> nn.Module:
    """R, with orthonormal rows, as the paper has it: `.weight` [hidden, rank] stays orthonormal while trained."""
    rotate = nn.Linear(hidden_size, rank, bias=False)
    rotate.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden_size, rank)))
    if rank == hidden_size:  # torch's form for square matrices is another
        return nn.utils.parametrizations.orthogonal(rotate)
    register_parametrization(rotate, "weight", Householder(), unsafe=True)
    return rotate
