"""Householder's parametrization is torch's own in value, gradient, names and start."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reftserve.interventions.families.orthonormal import Householder, orthonormal


def torchs(hidden: int, rank: int) -> nn.Module:
    rotate = nn.Linear(hidden, rank, bias=False)
    rotate.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden, rank)))
    return nn.utils.parametrizations.orthogonal(rotate)


@given(st.integers(1, 8), st.integers(1, 24), st.integers(0, 2**31), st.floats(0.0, 3.0))
def test_value_and_gradient_are_torchs(rank: int, more: int, seed: int, spread: float) -> None:
    hidden = rank + more
    torch.manual_seed(seed)
    expected = torchs(hidden, rank).double()
    torch.manual_seed(seed)
    found = orthonormal(hidden, rank).double()
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)
    moved = expected.parametrizations.weight.original + spread * torch.randn(hidden, rank).double().tril(-1)
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
    # As exact as the base, which was made in float32.
    torch.testing.assert_close(value.T @ value, torch.eye(rank).double(), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_value() -> None:
    torch.manual_seed(0)
    module = orthonormal(7, 3).double()
    parametrization = module.parametrizations.weight[0]
    assert isinstance(parametrization, Householder)
    start = module.parametrizations.weight.original.detach()
    below = torch.ones(7, 3).tril(-1).bool()  # the diagonal holds signs: nothing is learned through it

    def value(numbers: torch.Tensor) -> torch.Tensor:
        return parametrization(start.masked_scatter(below, numbers))

    assert torch.autograd.gradcheck(value, (torch.randn(int(below.sum())).double().requires_grad_(),))
