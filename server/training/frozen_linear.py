"""Linear layers of a frozen base while something else is trained: y = x W^T + b, and dx = dy W on the way back.

The engine's kernel computes both from panels (engine/native/linear.cpp), where torch's products through MKL bring the
weight into their layout at every call. The panels are private memory beside the weights: those of W are made when a
layer is first computed, those of its transpose when a gradient first comes back through it, which below the lowest
edit never happens; `release` gives all of it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.transposed_product(gradients[0]), None


class FrozenLinear:
    """The forward of one `nn.Linear` whose weight never changes, float32 on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._panels: Tensor | None = None
        self._transposed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def product(self, x: Tensor) -> Tensor:
        """The product x W^T + b; remembers nothing for a backward pass."""
        linear = self._linear
        if self._panels is None:
            self._panels = torch.ops.reftserve.pack_linear(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach()
        y: Tensor = torch.ops.reftserve.linear(x, self._panels, bias, linear.out_features)
        return y

    def transposed_product(self, y: Tensor) -> Tensor:
        """The product y W: [..., out] -> [..., in]."""
        if self._transposed is None:
            self._transposed = torch.ops.reftserve.pack_linear(self._linear.weight.detach().T)
        x: Tensor = torch.ops.reftserve.linear(y, self._transposed, None, self._linear.in_features)
        return x

    @property
    def nbytes(self) -> int:
        """Memory that the panels take."""
        return sum(panels.nbytes for panels in (self._panels, self._transposed) if panels is not None)

    def release(self) -> None:
        """Give the panels' memory back; they are made again when they are needed."""
        self._panels = self._transposed = None


def use_frozen_linears(model: PreTrainedModel) -> list[FrozenLinear]:
    """Let every plain linear layer of the model compute this way from now on; its modules and weights stay."""
    frozen = []
    for module in model.modules():
        if type(module) is nn.Linear:
            layer = FrozenLinear(module)
            module.forward = layer  # type: ignore[method-assign, assignment]
            frozen.append(layer)
    return frozen
