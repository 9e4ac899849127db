"""Replaces modules of a frozen model by faster forms; random inputs and a comparison check that a form is equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = 5
TOLERANCE = 1e-4


def replace_modules(model: nn.Module, form: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace each submodule by `form(submodule)`, unless that is None."""
    # The list holds parents only, so a replaced leaf's memory is freed at once.
    for parent in [module for module in model.modules() if any(True for _ in module.children())]:
        for name, child in list(parent.named_children()):
            other = form(child)
            if other is not None:
                setattr(parent, name, other)


def random_rows(size: int, rows: int = ROWS) -> Tensor:
    """Return the same random numbers at every call, [1, rows, size]."""
    return torch.randn(1, rows, size, generator=torch.Generator().manual_seed(0))


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether both have the same shape and agree up to float32 rounding."""
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
