"""Float32 linear layers of the frozen base, packed for the CPU kernel (cpu_kernels/linear.cpp) where it is faster. The
kernel reads a panel of 48 output channels from memory once, for y = x W^T and for a gradient's y W; torch calls MKL,
which repacks the weight at every call. Panels replace the plain weights. `benchmarks/linears.py` measures the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn

from reftserve.server.base.kernel_choice import ROWS, KernelChoice, Trial
from reftserve.server.base.replacement import random_rows, replace_modules


class PanelLinear(nn.Module):
    """y = x W^T + b in float32 for layers with the same input. weight: W in panels, [panels, in, 48]; frozen."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(_side_by_side([_panels(layer) for layer in layers]), requires_grad=False)
        bias = joined_bias(layers)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.sizes: list[int] = [layer.out_features for layer in layers]
        self.in_features: int = layers[0].in_features
        self.out_features: int = sum(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of all layers]."""
        y: Tensor = torch.ops.reftserve.linear(x, self.weight, self.bias, self.sizes)
        return y

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [..., in] -> [..., out] for each layer, views of one tensor."""
        return torch.split(self.forward(x), self.sizes, dim=-1)

    def unpacked(self) -> Tensor:
        """Return a single layer's W as a new tensor, [out, in]."""
        return self.weight.transpose(1, 2).flatten(0, 1)[: self.out_features]


class PanelEmbedding(nn.Module):
    """An embedding that reads its rows from a linear layer's panels, [panels, size, 48], and keeps no copy."""

    def __init__(self, panels: nn.Parameter) -> None:
        super().__init__()
        self.weight = panels

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] -> [..., size]."""
        width = self.weight.shape[-1]
        return self.weight[ids // width, :, ids % width]


Linear = nn.Linear | PanelLinear
TRIAL_WEIGHTS = 1 << 20


def is_linear(module: nn.Module | None) -> TypeGuard[Linear]:
    """Whether this is a plain or a packed linear layer. A subclass may compute something else, so it does not count."""
    return type(module) in (nn.Linear, PanelLinear)


class JoinedLinear(nn.Module):
    """y = x W^T + b by torch, for several plain layers with the same input. weight: [out of all layers, in]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [layer.weight.detach() for layer in layers]
        self.weight = nn.Parameter(_side_by_side(weights), requires_grad=False)
        bias = joined_bias(layers)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.sizes = [layer.out_features for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of all layers]."""
        return nn.functional.linear(x, self.weight, self.bias)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [..., in] -> [..., out] for each layer, views of one tensor."""
        return torch.split(self.forward(x), self.sizes, dim=-1)


def joined(layers: Sequence[Linear]) -> PanelLinear | JoinedLinear:
    """Join layers with the same input into one layer: plain if all are plain, else in panels."""
    plain = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return JoinedLinear(plain) if len(plain) == len(layers) else PanelLinear(layers)


def takes_kernels(model: nn.Module) -> bool:
    """Whether the CPU kernels can compute the model: all its parameters are float32 on the CPU."""
    return {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


def pack_linears(model: nn.Module, kernels: KernelChoice) -> None:
    """Pack the model's linear layers into panels if the kernel is faster for the shape that holds most weights."""
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    if not plain:
        return
    weights: Counter[tuple[int, int]] = Counter()
    for layer in plain:
        weights[layer.out_features, layer.in_features] += layer.weight.numel()
    (out_features, in_features), _ = weights.most_common(1)[0]
    layer = next(n for n in plain if (n.out_features, n.in_features) == (out_features, in_features))
    if kernels.takes("linear", f"{in_features}x{out_features}", lambda: _linear_trials(layer)):
        use_panels(model)


def _linear_trials(layer: nn.Linear) -> list[Trial]:
    out_features = min(layer.out_features, max(1, TRIAL_WEIGHTS // layer.in_features))
    plain = nn.Linear(layer.in_features, out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.weight.detach()[:out_features], requires_grad=False)
    packed = PanelLinear([plain])
    inputs = [random_rows(layer.in_features, rows)[0] for rows in ROWS]
    return [Trial(partial(packed, x), partial(plain, x)) for x in inputs]


def use_panels(model: nn.Module) -> None:
    """Pack a frozen model's linear layers into panels; tied embeddings read from these. Requires `takes_kernels`."""
    embedded = {id(m.weight) for m in model.modules() if type(m) is nn.Embedding and m.max_norm is None}
    tied: dict[int, nn.Parameter] = {}

    def linear(child: nn.Module) -> nn.Module | None:
        if type(child) is not nn.Linear:
            return None
        packed = PanelLinear([child])
        if id(child.weight) in embedded:
            tied[id(child.weight)] = packed.weight
        return packed

    def embedding(child: nn.Module) -> nn.Module | None:
        panels = tied.get(id(child.weight)) if type(child) is nn.Embedding else None
        return None if panels is None else PanelEmbedding(panels)

    replace_modules(model, linear)
    replace_modules(model, embedding)


def joined_bias(layers: Sequence[Linear]) -> Tensor | None:
    """Return the layers' biases concatenated, zeros for a layer without one; None if no layer has a bias."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(n.out_features) if n.bias is None else n.bias.detach() for n in layers])


def _panels(layer: Linear) -> Tensor:
    weight = layer.weight.detach()
    panels: Tensor = weight if isinstance(layer, PanelLinear) else torch.ops.reftserve.pack_linear(weight)
    return panels


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """Concatenate the layers' weights; a view if they are adjacent in memory, as in the shared weights file."""
    first = weights[0]
    if all(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.data_ptr() + one.nbytes == other.data_ptr()
        for one, other in pairwise(weights)
    ):
        return first.as_strided((sum(map(len, weights)), *first.shape[1:]), first.stride())
    return torch.cat(list(weights))
