"""Optional int8 linear layers of the frozen base on the CPU (cpu_kernels/int8.cpp). Weights are scaled per output
channel, activations per token, and products are exact integers, so a row's result does not depend on its batch. Layers
that read the same tensor (query, key and value) are one product, because rounding it takes as long as the product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reftserve.server.base.panels import Linear, PanelLinear, is_linear, joined_bias
from reftserve.server.base.replacement import replace_modules

INT8_MAX = 127
TINY = 1e-12  # a channel of zeros needs a scale above 0


class Int8Weight(nn.Module):
    """Weights of one or more layers with the same input: int8 [out, in], float32 scale [out], bias."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        weight, bias = torch.cat([_dense(layer) for layer in layers]), joined_bias(layers)
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_(min=TINY) / INT8_MAX
        self.weight = nn.Parameter((weight / scale).round_().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Int8Linear(nn.Module):
    """y = x W^T + b in integers. precise: multiply the activations' rounding error too, so only weights are inexact."""

    def __init__(self, layers: Sequence[Linear], *, precise: bool = False) -> None:
        super().__init__()
        self.packed = Int8Weight(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.precise = precise

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of a single layer for x [..., in]."""
        return self.parts(x)[0]

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return [..., out] of each layer for x [..., in]."""
        packed = self.packed
        outputs: list[Tensor] = torch.ops.reftserve.int8_linear(
            x, packed.weight, packed.scale, packed.bias, self.precise, self.sizes
        )
        return outputs


class _Siblings:
    """Layers with the same input: the first call computes all of them, later calls take their part."""

    def __init__(self, layer: Int8Linear) -> None:
        self._layer = layer
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def part(self, x: Tensor, index: int) -> Tensor:
        if x is not self._input:
            self._input, self._outputs = x, self._layer.parts(x)
        output = self._outputs[index]
        if index == len(self._outputs) - 1:
            self._input, self._outputs = None, []
        return output


class SiblingLinear(nn.Module):
    """One of several linear layers with the same input. layer: all of them as one, shared."""

    def __init__(self, layer: Int8Linear, siblings: _Siblings, index: int) -> None:
        super().__init__()
        self.layer = layer
        self._siblings = siblings
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of this layer for x [..., in]."""
        return self._siblings.part(x, self._index)


@contextmanager
def found_siblings(model: nn.Module) -> Iterator[list[list[Linear]]]:
    """Yield groups of a parent's linear layers that read the same tensor; filled by a forward pass in the context."""
    groups: list[list[Linear]] = []
    readers: defaultdict[tuple[int, int], list[Linear]] = defaultdict(list)
    kept: list[Tensor] = []  # so that ids stay unique
    hooks = []
    for parent in model.modules():
        for child in parent.children():
            if is_linear(child):

                def record(module: nn.Module, inputs: tuple[Tensor, ...], parent: int = id(parent)) -> None:
                    kept.append(inputs[0])
                    readers[parent, id(inputs[0])].append(module)  # type: ignore[arg-type]

                hooks.append(child.register_forward_pre_hook(record))
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    groups += [layers for layers in readers.values() if len(set(layers)) == len(layers) > 1]


def round_linears(model: nn.Module, siblings: Sequence[Sequence[Linear]]) -> None:
    """Replace a frozen float32 model's linear layers with int8 ones. siblings: groups to compute as one."""
    head = getattr(model, "lm_head", None)
    forms: dict[nn.Module, nn.Module] = {}
    remaining = set(model.modules())
    for group in (group for group in siblings if remaining.issuperset(group)):  # the rest is fused already
        layer = Int8Linear(group)
        shared = _Siblings(layer)
        forms.update({member: SiblingLinear(layer, shared, index) for index, member in enumerate(group)})

    def form(child: nn.Module) -> nn.Module | None:
        if not is_linear(child):
            return None
        # No norm precedes the output projections of attention and MLP, so their inputs have outliers.
        return forms.get(child) or Int8Linear([child], precise=child is not head)

    replace_modules(model, form)


def _dense(layer: Linear) -> Tensor:
    return layer.unpacked() if isinstance(layer, PanelLinear) else layer.weight.detach()
