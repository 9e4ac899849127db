"""Linear layers of the frozen base in the forms that a CPU computes fastest (native/linear.cpp, native/int8.cpp).

- Float32 weights in panels of output channels: a kernel streams each from memory once. torch's own `linear` goes to MKL
  and brings the weight into its kernel's layout at every call.
- Int8, when asked for: weights scaled per output channel, activations per token, so that one request's scale never
  depends on another's. The products are exact integers, so a row's result does not depend on its batch at all.
- In int8, layers that read the same tensor (query, key and value) are computed as one: rounding it takes as long as the
  product.

`benchmarks/linears.py` measures them. The forms replace the plain weights, so they cost no memory, but for a
language-model head that shares its weight with the embedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INT8_MAX = 127
TINY = 1e-12  # a channel of zeros has a scale too


class PackedLinear(nn.Module):
    """y = x W^T + b for one layer, or several that read one tensor, in float32. weight: W in panels."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        weight, bias = _joined(layers)
        self.weight = nn.Parameter(torch.ops.reftserve.pack_linear(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of all layers]."""
        y: Tensor = torch.ops.reftserve.linear(x, self.weight, self.bias, self.out_features)
        return y


class Int8Weight(nn.Module):
    """Weights of one layer, or of several that read one tensor: int8 [out, in], float32 scale [out], bias."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        weight, bias = _joined(layers)
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_(min=TINY) / INT8_MAX
        self.weight = nn.Parameter((weight / scale).round_().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Int8Linear(nn.Module):
    """y = x W^T + b in integers, by the kernel in native/int8.cpp.

    precise: what rounding the activations leaves over is rounded once more and multiplied too; then only the weights
    are inexact.
    """

    def __init__(self, layers: list[nn.Linear], *, precise: bool = False) -> None:
        super().__init__()
        self.packed = Int8Weight(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.precise = precise

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], of a single layer."""
        return self.parts(x)[0]

    def parts(self, x: Tensor) -> list[Tensor]:
        """x: [..., in] -> [..., out] for each layer."""
        packed = self.packed
        outputs: list[Tensor] = torch.ops.reftserve.int8_linear(
            x, packed.weight, packed.scale, packed.bias, self.precise, self.sizes
        )
        return outputs


class _Siblings:
    """Layers that read the same tensor: the first that is called computes all, the others take their part."""

    def __init__(self, layer: Int8Linear) -> None:
        self._layer = layer
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def part(self, x: Tensor, index: int) -> Tensor:
        """Output `index` for the input x."""
        if x is not self._input:
            self._input, self._outputs = x, self._layer.parts(x)
        output = self._outputs[index]
        if index == len(self._outputs) - 1:
            self._input, self._outputs = None, []  # keeps nothing alive after the last
        return output


class SiblingLinear(nn.Module):
    """One of several linear layers that read the same tensor. layer: all of them as one, shared."""

    def __init__(self, layer: Int8Linear, siblings: _Siblings, index: int) -> None:
        super().__init__()
        self.layer = layer
        self._siblings = siblings
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of this one]."""
        return self._siblings.part(x, self._index)


@contextmanager
def found_siblings(model: nn.Module) -> Iterator[list[list[nn.Linear]]]:
    """Groups of linear layers of one parent that were given the very same tensor in a forward pass inside."""
    groups: list[list[nn.Linear]] = []
    readers: defaultdict[tuple[int, int], list[nn.Linear]] = defaultdict(list)
    kept: list[Tensor] = []  # so that no two inputs have one id
    hooks = []
    for parent in model.modules():
        for child in parent.children():
            if type(child) is nn.Linear:

                def record(module: nn.Module, inputs: tuple[Tensor, ...], parent: int = id(parent)) -> None:
                    kept.append(inputs[0])
                    readers[parent, id(inputs[0])].append(module)  # type: ignore[arg-type]

                hooks.append(child.register_forward_pre_hook(record))
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    groups += [layers for layers in readers.values() if len(set(layers)) == len(layers) > 1 and _alike(layers)]


def replace_linears(model: nn.Module, siblings: list[list[nn.Linear]], *, int8: bool) -> None:
    """Bring a frozen float32 model's linear layers into their fast forms.

    siblings: groups to compute as one in int8.
    """
    head = getattr(model, "lm_head", None)

    def form(linear: nn.Linear) -> nn.Module:
        # Attention's and the MLP's outputs go through no norm before they are projected: outliers are theirs.
        return Int8Linear([linear], precise=linear is not head) if int8 else PackedLinear([linear])

    forms: dict[nn.Linear, nn.Module] = {}
    for group in siblings if int8 else ():
        layer = Int8Linear(group)
        shared = _Siblings(layer)
        forms.update({member: SiblingLinear(layer, shared, index) for index, member in enumerate(group)})
    _replace(model, lambda linear: forms.get(linear) or form(linear))


def _replace(model: nn.Module, form: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, form(child))


def _joined(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return weight, None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])


def _alike(layers: list[nn.Linear]) -> bool:
    return len({layer.bias is None for layer in layers}) == 1
