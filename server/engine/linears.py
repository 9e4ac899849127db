"""Linear layers of the frozen base in the forms that a CPU computes fastest.

- Float32 weights in oneDNN's own layout. torch's `linear` goes to MKL and brings the weight into its kernel's layout at
  every call; a weight that was brought into oneDNN's once takes half the time at up to 64 rows, and less at any number.
- Int8, when asked for: weights scaled per output channel, activations per token, so that one request's scale never
  depends on another's. The products are exact integers, so a row's result does not depend on its batch at all.
- In int8, layers that read the same tensor (query, key and value; gate and up) are computed as one: rounding it takes
  as long as the product. In float32 that gains nothing.

`benchmarks/linears.py` measures them. The forms replace the plain weights, so they cost no memory, but for a
language-model head that shares its weight with the embedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reftserve.server.engine.errors import UnsupportedModel

INT8_MAX = 127
TINY = 1e-12  # a row of zeros has a scale too
RESIDUAL_STEPS = 254  # what rounding to int8 leaves, at most half a step, is 127 of these


class PackedLinear(nn.Module):
    """y = x W^T + b. weight: the frozen W [out, in] in oneDNN's layout; `to_dense()` gives it back exactly."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class Int8Linear(nn.Module):
    """y = x W^T + b in integers. weight: int8 [out, in]; scale: float32 [1, out].

    precise: what rounding the activations leaves over is rounded once more and multiplied too, as further rows of the
    same product; then only the weights are inexact.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, precise: bool = False) -> None:
        super().__init__()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_(min=TINY) / INT8_MAX
        self.weight = nn.Parameter((weight / scale).round_().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)
        self.bias = _frozen(bias)
        self.precise = precise

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY).mul_(1 / INT8_MAX)
        exact = rows / scale
        rounded = exact.round()
        if self.precise:
            rest = exact.sub_(rounded).mul_(RESIDUAL_STEPS).round_()
            product = self._product(torch.cat((rounded, rest)))
            y = product[: len(rows)].add_(product[len(rows) :], alpha=1 / RESIDUAL_STEPS)
        else:
            y = self._product(rounded)
        y = y.mul_(scale).mul_(self.scale)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def _product(self, integers: Tensor) -> Tensor:
        # The conversion stands by itself: torch multiplies int32 by float32 without vector instructions.
        return torch._int_mm(integers.to(torch.int8), self.weight.t()).float()


class _Siblings:
    """Layers that read the same tensor: the first that is called computes all, the others take their part."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def part(self, layer: nn.Module, x: Tensor, index: int) -> Tensor:
        """Output `index` for the input x."""
        if x is not self._input:
            # Dense parts: what follows them would go through strided ones at a third of the speed.
            parts = torch.split(layer(x), self._sizes, dim=-1)
            self._input, self._outputs = x, tuple(part.contiguous() for part in parts)
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outputs = None, ()  # keeps nothing alive after the last
        return output


class SiblingLinear(nn.Module):
    """One of several linear layers that read the same tensor. layer: all of them as one, shared."""

    def __init__(self, layer: nn.Module, siblings: _Siblings, index: int) -> None:
        super().__init__()
        self.layer = layer
        self._siblings = siblings
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of this one]."""
        return self._siblings.part(self.layer, x, self._index)


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
    """Bring a frozen model's linear layers into their fast forms. siblings: groups to compute as one in int8.

    int8 raises UnsupportedModel where it is not served: anything but float32 on the CPU, which else stays as it is.
    """
    is_fast = {p.dtype for p in model.parameters()} == {torch.float32} and _on_cpu(model)
    if int8 and not is_fast:
        raise UnsupportedModel("quantization int8 is served on the CPU and from float32 weights only")
    if not int8 and not (is_fast and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return
    head = getattr(model, "lm_head", None)

    def make(layers: list[nn.Linear]) -> nn.Module:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        if not int8:
            return PackedLinear(weight, bias)
        # Attention's and the MLP's outputs go through no norm before they are projected: outliers are theirs.
        return Int8Linear(weight, bias, precise=len(layers) == 1 and layers[0] is not head)

    forms: dict[nn.Linear, nn.Module] = {}
    for group in siblings if int8 else ():
        layer, shared = make(group), _Siblings([member.out_features for member in group])
        forms.update({member: SiblingLinear(layer, shared, index) for index, member in enumerate(group)})
    _replace(model, lambda linear: forms.get(linear) or make([linear]))


def _replace(model: nn.Module, form: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, form(child))


def _alike(layers: list[nn.Linear]) -> bool:
    return len({layer.bias is None for layer in layers}) == 1


def _on_cpu(model: nn.Module) -> bool:
    return {p.device.type for p in model.parameters()} == {"cpu"}


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
