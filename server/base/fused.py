"""Modules of the frozen base that the CPU kernels compute in fewer passes: RMS norms, gated MLPs, attention.

A module is taken for one by its parts, and replaced only when the kernel's output equals its own on a probe: what looks
like one of them and is something else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reftserve.server.base.fused_attention import fused_attention
from reftserve.server.base.int8 import Int8Weight
from reftserve.server.base.panels import PanelLinear, is_linear
from reftserve.server.base.replacement import equal, random_rows, replace_modules

# The numbers of cpu_kernels/activation.h, by what `torch.nn.functional` computes for them.
ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    0: nn.functional.silu,
    1: lambda x: nn.functional.gelu(x, approximate="tanh"),
}


class FusedRMSNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + epsilon), float32."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]."""
        out: Tensor = torch.ops.reftserve.rms_norm(x, self.weight, self.epsilon)
        return out


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up as one product, float32."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: int) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        out: Tensor = self.down(torch.ops.reftserve.gated_activation(self.gate_up(x), self.activation))
        return out


class Int8FusedMLP(nn.Module):
    """The same in integers (`int8.Int8Linear`), `down` precise."""

    def __init__(self, gate_up: Int8Weight, down: Int8Weight, activation: int) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        first, second = self.gate_up, self.down
        out: Tensor = torch.ops.reftserve.int8_gated_mlp(
            x, first.weight, first.scale, first.bias, second.weight, second.scale, second.bias, self.activation
        )
        return out


@torch.no_grad()  # not inference mode: what is made under it cannot be kept for a way back
def fuse_modules(model: nn.Module, *, int8: bool) -> None:
    """Replace a float32 model's modules by their fused forms. Its linear layers are plain, or packed.

    Attention modules are replaced where the model's attention is ours (`attention.ATTENTION`).
    """
    # Norms first: attention may hold some.
    for form in (_norm, partial(_mlp, int8=int8), partial(fused_attention, int8=int8)):
        replace_modules(model, form)


def _norm(module: nn.Module) -> FusedRMSNorm | None:
    if "RMSNorm" not in type(module).__name__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight: Any = module.weight
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float) or weight.dim() != 1:
        return None
    probe = random_rows(weight.shape[0])
    # Gemma's weights are what is added to 1.
    for candidate in (weight.detach().clone(), 1.0 + weight.detach()):
        fused = FusedRMSNorm(candidate, epsilon)
        if equal(fused(probe), module(probe)):
            return fused
    return None


def _mlp(module: nn.Module, *, int8: bool) -> nn.Module | None:
    parts = dict(module.named_children())
    layers = [parts.get(f"{name}_proj") for name in ("gate", "up", "down")]
    linears = [layer for layer in layers if is_linear(layer)]
    if len(linears) < len(layers):
        return None
    gate, up, down = linears
    probe = random_rows(gate.in_features)
    expected: Tensor = module(probe)
    for number, activation in ACTIVATIONS.items():
        if equal(down(activation(gate(probe)) * up(probe)), expected):
            if int8:
                return Int8FusedMLP(Int8Weight([gate, up]), Int8Weight([down]), number)
            return FusedMLP(PanelLinear([gate, up]), PanelLinear([down]), number)
    return None
