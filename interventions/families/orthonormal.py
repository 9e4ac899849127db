"""Matrices that stay orthonormal in training: torch's parametrization in a smaller and cheaper form.

`torch.nn.utils.parametrizations.orthogonal` multiplies a fixed matrix [hidden, hidden] by Householder reflections
H_1 ... H_rank of the parameter's columns, and differentiates them one by one: 1.9 ms for [576, 4]. This module takes
a few small products, the compact form (Schreiber and Van Loan 1989). It stores the fixed matrix as reflections too.

    H_1 ... H_rank = I - V T V^T,    T^-1 = striu(V^T V) + diag(V^T V) / 2       V [hidden, rank] unit lower triangular

Parameters and buffers have torch's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class Reflections:
    """The product H_1 ... H_rank of the reflections below the diagonal of a matrix [hidden, rank]."""

    def __init__(self, columns: Tensor) -> None:
        self.eye = torch.eye(*columns.shape, dtype=columns.dtype, device=columns.device)
        self._V = columns.tril(-1) + self.eye
        gram = self._V.T @ self._V
        self._inverse = gram.triu(1) + torch.diag(gram.diagonal() / 2)

    def of(self, rows: Tensor) -> Tensor:
        """Return the product times rows [hidden, rank]."""
        weights = torch.linalg.solve_triangular(self._inverse, self._V.T @ rows, upper=True)
        product: Tensor = rows - self._V @ weights
        return product


class Householder(nn.Module):
    """Map a parameter [hidden, rank], rank < hidden, to base @ H_1 ... H_rank, orthonormal. Both hold reflections."""

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", None)
        self._constant: tuple[Tensor, int, Reflections] | None = None

    def forward(self, parameter: Tensor) -> Tensor:
        """Return the orthonormal matrix [hidden, rank] of a parameter [hidden, rank]."""
        base = self._base_reflections()
        return base.of(Reflections(parameter).of(base.eye) * parameter.detach().diagonal())

    @torch.no_grad()
    def right_inverse(self, matrix: Tensor) -> Tensor:
        """Return the parameter of an orthonormal matrix [hidden, rank]: signs only, since it becomes the base."""
        self.base = torch.geqrf(matrix)[0].tril(-1)
        base = Reflections(self.base)
        # With zeros below the diagonal, each of the parameter's reflections flips the sign of its column.
        return -base.eye * (base.of(base.eye) * matrix).sum(dim=0).sgn()

    def _base_reflections(self) -> Reflections:
        """Return the base's reflections, recomputed when a checkpoint replaces or overwrites the base."""
        base, version = self.base, self.base._version
        if self._constant is None or self._constant[0] is not base or self._constant[1] != version:
            self._constant = base, version, Reflections(base)
        return self._constant[2]


def orthonormal(hidden_size: int, rank: int) -> nn.Module:
    """Return a module whose `.weight` [hidden, rank] is R^T, with orthonormal columns that training keeps."""
    rotate = nn.Linear(hidden_size, rank, bias=False)
    rotate.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden_size, rank)))
    if rank == hidden_size:  # torch parametrises square matrices differently
        return nn.utils.parametrizations.orthogonal(rotate)
    register_parametrization(rotate, "weight", Householder(), unsafe=True)
    return rotate
