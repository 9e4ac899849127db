"""Replacing modules of a frozen model by faster forms, and proving on a probe that a form computes the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = 5
TOLERANCE = 1e-4


def replace_modules(model: nn.Module, form: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `form(child)` in the place of each child of the model or of a part of it, unless it is None."""
    # Parents alone, so that what is replaced goes at once.
    for parent in [module for module in model.modules() if any(True for _ in module.children())]:
        for name, child in list(parent.named_children()):
            other = form(child)
            if other is not None:
                setattr(parent, name, other)


def random_rows(size: int, rows: int = ROWS) -> Tensor:
    """The same random numbers at every call, [1, rows, size]."""
    return torch.randn(1, rows, size, generator=torch.Generator().manual_seed(0))


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether both are the same up to rounding in float32."""
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
