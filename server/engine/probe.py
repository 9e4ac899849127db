"""How the fused forms of a frozen model's modules (`fused.py`, `fused_attention.py`) are compared with the modules."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 5
TOLERANCE = 1e-4


def random_rows(size: int, rows: int = ROWS) -> Tensor:
    """The same random numbers at every call, [1, rows, size]."""
    return torch.randn(1, rows, size, generator=torch.Generator().manual_seed(0))


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether both are the same up to rounding in float32."""
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
