"""Householder equals torch's parametrization in value and gradient; it is small and begins at a given matrix."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reftserve.interventions.families.orthonormal import Householder, orthonormal


def torchs(hidden: int, rank: int, base: Tensor) -> nn.Module:
    """Return torch's parametrization, with the product of the reflections below base's diagonal as its fixed matrix."""
    module = nn.utils.parametrizations.orthogonal(nn.Linear(hidden, rank, bias=False).double())
    factors = 2 / (1 + base.square().sum(dim=0))
    square = torch.cat([base, base.new_zeros(hidden, hidden - rank)], dim=1)
    factors = torch.cat([factors, base.new_zeros(hidden - rank)])
    module.parametrizations.weight[0].base = torch.linalg.householder_product(square, factors)
    return module


@given(st.integers(1, 8), st.integers(1, 24), st.integers(0, 2**31), st.floats(0.0, 3.0))
def test_value_and_gradient_equal_torchs(rank: int, more: int, seed: int, spread: float) -> None:
    hidden = rank + more
    torch.manual_seed(seed)
    found = orthonormal(hidden, rank).double()
    expected = torchs(hidden, rank, found.parametrizations.weight[0].base)
    assert found.state_dict().keys() == expected.state_dict().keys()
    moved = found.parametrizations.weight.original + spread * torch.randn(hidden, rank).double().tril(-1)
    weight = torch.randn(hidden, rank).double()
    gradients = []
    for module in (found, expected):
        parameter = moved.detach().clone().requires_grad_()
        value = module.parametrizations.weight[0](parameter)
        (value * weight).sum().backward()
        gradients.append((value.detach(), parameter.grad))
    (value, gradient), (right_value, right_gradient) = gradients
    torch.testing.assert_close(value, right_value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, right_gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value.T @ value, torch.eye(rank).double(), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 8), st.integers(1, 24), st.integers(0, 2**31))
def test_the_parametrization_begins_at_the_given_matrix(rank: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    matrix = nn.init.orthogonal_(torch.empty(rank + more, rank))
    module = orthonormal(rank + more, rank)
    module.weight = matrix
    torch.testing.assert_close(module.weight, matrix, rtol=1e-5, atol=1e-5)
    module.weight = torch.eye(rank + more, rank)
    torch.testing.assert_close(module.weight, torch.eye(rank + more, rank), rtol=0, atol=0)


def test_the_saved_matrix_survives_loading_and_conversion() -> None:
    saved, other = orthonormal(9, 3), orthonormal(9, 3)
    assert not torch.equal(other.weight, saved.weight)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.weight, saved.weight)
    torch.testing.assert_close(other.double().weight, saved.weight.double(), rtol=1e-5, atol=1e-5)
    assert other.weight.dtype == torch.float64


def test_no_saved_tensor_is_larger_than_the_matrix() -> None:
    assert {tuple(tensor.shape) for tensor in orthonormal(64, 4).state_dict().values()} == {(64, 4)}


def test_the_gradient_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)
    module = orthonormal(7, 3).double()
    parametrization = module.parametrizations.weight[0]
    assert isinstance(parametrization, Householder)
    start = module.parametrizations.weight.original.detach()
    below = torch.ones(7, 3).tril(-1).bool()  # the diagonal holds signs and gets no gradient

    def value(numbers: torch.Tensor) -> torch.Tensor:
        return parametrization(start.masked_scatter(below, numbers))

    assert torch.autograd.gradcheck(value, (torch.randn(int(below.sum())).double().requires_grad_(),))
