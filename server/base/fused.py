"""Fused forms of the frozen base's RMS norms and gated MLPs on the CPU; `fused_attention.py` has attention. A module is
recognised by its submodules. It is replaced only if the fused form gives the same output on a probe and the kernel is
faster than torch's operations (`kernel_choice.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reftserve.server.base.fused_attention import fused_attention
from reftserve.server.base.int8 import Int8Weight
from reftserve.server.base.kernel_choice import ALL_KERNELS, ROWS, KernelChoice, Trial
from reftserve.server.base.panels import is_linear, joined
from reftserve.server.base.replacement import equal, random_rows, replace_modules

# The numbers of cpu_kernels/activation.h, and torch's function for each.
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
    """down(act(gate(x)) * up(x)) in float32, with gate and up as one product."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: int) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        out: Tensor = self.down(torch.ops.reftserve.gated_activation(self.gate_up(x), self.activation))
        return out


class Int8FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) in int8 (`int8.Int8Linear`), with a precise `down`."""

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


@torch.no_grad()  # not inference mode: autograd cannot save tensors created in inference mode
def fuse_modules(model: nn.Module, *, int8: bool, kernels: KernelChoice = ALL_KERNELS) -> None:
    """Replace a float32 model's norms, MLPs and attention that uses `attention.ATTENTION`, where `kernels` allows."""
    # Norms first: attention modules may contain norms.
    for form in (_norm, partial(_mlp, int8=int8), partial(fused_attention, int8=int8)):
        replace_modules(model, partial(form, kernels=kernels))


def _norm(module: nn.Module, *, kernels: KernelChoice) -> FusedRMSNorm | None:
    if "RMSNorm" not in type(module).__name__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight: Any = module.weight
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float) or weight.dim() != 1:
        return None
    size = weight.shape[0]
    probe = random_rows(size)
    # Gemma's norm multiplies by 1 + weight.
    for candidate in (weight.detach().clone(), 1.0 + weight.detach()):
        fused = FusedRMSNorm(candidate, epsilon)
        if equal(fused(probe), module(probe)):
            return fused if kernels.takes("rms_norm", f"{size}", partial(_norm_trials, fused, module)) else None
    return None


def _norm_trials(fused: FusedRMSNorm, module: nn.Module) -> list[Trial]:
    inputs = [random_rows(len(fused.weight), rows) for rows in ROWS]
    return [Trial(partial(fused, x), partial(module, x)) for x in inputs]


def _mlp(module: nn.Module, *, int8: bool, kernels: KernelChoice) -> nn.Module | None:
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
            trials = partial(_activation_trials, gate.out_features, number)
            if kernels.takes("gated_activation", f"{gate.out_features}", trials):
                return FusedMLP(joined([gate, up]), down, number)
            return None
    return None


def _activation_trials(size: int, number: int) -> list[Trial]:
    activation = ACTIVATIONS[number]
    trials = []
    for rows in ROWS:
        gate_up = random_rows(2 * size, rows)
        gate, up = (part.contiguous() for part in gate_up.chunk(2, dim=-1))
        trials.append(
            Trial(
                partial(torch.ops.reftserve.gated_activation, gate_up, number),
                lambda gate=gate, up=up: activation(gate) * up,  # type: ignore[misc]
            )
        )
    return trials
