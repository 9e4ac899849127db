"""The fused form of the frozen base's attention modules on the CPU, and the probe that decides where it fits: both
forms must pass the same tensors to attention and return the same output. One product computes query, key and value. A
kernel rotates them (Su et al. 2021), in place if no gradient is needed; transformers' rotation alone is fourteen
operations a layer, and the number of operations bounds a step of few rows.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reftserve.server.base.attention import attention_step, current_step
from reftserve.server.base.int8 import Int8Linear
from reftserve.server.base.kernel_choice import ROWS, KernelChoice, Trial
from reftserve.server.base.panels import JoinedLinear, PanelLinear, is_linear, joined
from reftserve.server.base.replacement import equal, random_rows

ROTATION = "position_embeddings"


class FusedAttention(nn.Module):
    """One layer's attention in float32. qkv: query, key and value as one layer. norms: of each head's query and key."""

    def __init__(
        self,
        qkv: PanelLinear | JoinedLinear | Int8Linear,
        o_proj: nn.Module,
        norms: tuple[nn.Module, nn.Module] | None,
        *,
        layer: int,
        head_dim: int,
        value_dim: int,
        scale: float | None,
        window: int | None,
    ) -> None:
        super().__init__()
        self.qkv, self.o_proj = qkv, o_proj
        self.q_norm: nn.Module | None
        self.k_norm: nn.Module | None
        self.q_norm, self.k_norm = norms or (None, None)
        self.layer, self.head_dim, self.value_dim = layer, head_dim, value_dim
        self.scale, self.window = scale, window

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, tokens, hidden]; position_embeddings: cosines and sines, [1, tokens, rotated size]."""
        query, key, value = self.qkv.parts(hidden_states[0])
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.view(len(query), -1, self.head_dim)).flatten(1)
            key = self.k_norm(key.view(len(key), -1, self.head_dim)).flatten(1)
        cosines, sines = position_embeddings
        if query.requires_grad:  # autograd cannot differentiate the kernel that works in place
            query, key = torch.ops.reftserve.rotated(query, key, cosines[0], sines[0], self.head_dim)
        else:
            torch.ops.reftserve.rotate(query, key, cosines[0], sines[0], self.head_dim)
        attended = current_step().attend(
            self.layer,
            _heads(query, self.head_dim),
            _heads(key, self.head_dim),
            _heads(value, self.value_dim),
            self.scale,
            self.window,
        )
        return self.o_proj(attended.flatten(1)).unsqueeze(0), None


def fused_attention(module: nn.Module, *, int8: bool, kernels: KernelChoice) -> FusedAttention | None:
    """Return the fused form of a module with four projections and perhaps query and key norms, or None."""
    parts = dict(module.named_children())
    q, k, v, o = (parts.pop(f"{name}_proj", None) for name in "qkvo")
    norms = (parts.pop("q_norm"), parts.pop("k_norm")) if parts.keys() == {"q_norm", "k_norm"} else None
    if parts or not hasattr(module, "head_dim") or ROTATION not in inspect.signature(module.forward).parameters:
        return None
    if not (is_linear(q) and is_linear(k) and is_linear(v) and is_linear(o)):
        return None
    x = random_rows(q.in_features)
    expected = _probed(module, x, rotates=True)
    if expected is None or _probed(module, x, rotates=False):  # a model may call this layer without a rotation
        return None
    call = expected.call
    shape = f"{call.query.shape[0]}+{call.key.shape[0]}x{call.query.shape[-1]}"
    if not kernels.takes("rotate", shape, lambda: _rotation_trials(call)):
        return None
    fused = FusedAttention(
        joined([q, k, v]),
        o,
        norms,
        layer=call.layer,
        head_dim=call.query.shape[-1],
        value_dim=call.value.shape[-1],
        scale=call.scale,
        window=call.window,
    )
    # Probe at two magnitudes, because some models clamp large values.
    for factor in (1.0, 1e4):
        found, expected = (_probed(each, factor * x, rotates=True) for each in (fused, module))
        if found is None or expected is None or not all(map(equal, found.tensors, expected.tensors)):
            return None
    if int8:
        fused.qkv = Int8Linear([q, k, v])
    return fused


@dataclass(frozen=True)
class _Call:
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    window: int | None


@dataclass(frozen=True)
class _Probed:
    call: _Call
    output: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.call.query, self.call.key, self.call.value, self.output


@dataclass
class _Recorder:
    calls: list[_Call] = field(default_factory=list)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        self.calls.append(_Call(layer, query.clone(), key.clone(), value.clone(), scale, window))
        heads, tokens, width = query.shape[0], query.shape[1], value.shape[-1]
        return random_rows(heads * width, tokens).view(tokens, heads, width)


def _probed(module: nn.Module, x: Tensor, *, rotates: bool) -> _Probed | None:
    """Run the module on x, with random cosines and sines if `rotates`; None unless it calls attention exactly once."""
    recorder = _Recorder()
    size: int = module.head_dim  # type: ignore[assignment]
    rotation = random_rows(size, 2 * x.shape[1]).chunk(2, dim=1) if rotates else None
    with attention_step(recorder):
        try:
            output, _ = module(hidden_states=x, attention_mask=None, **{ROTATION: rotation})
        except Exception:  # a module that fails on the probe keeps its own form
            return None
    return _Probed(recorder.calls[0], output) if len(recorder.calls) == 1 else None


def _rotation_trials(call: _Call) -> list[Trial]:
    dim = call.query.shape[-1]

    def rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        low, high = heads.chunk(2, dim=-1)
        return heads * cosines + torch.cat((-high, low), dim=-1) * sines

    trials = []
    for rows in ROWS:
        query, key = (random_rows(len(heads) * dim, rows)[0] for heads in (call.query, call.key))
        cosines, sines = random_rows(dim, 2 * rows)[0].chunk(2)
        by_head = [_heads(heads, dim).clone() for heads in (query, key)]
        trials.append(
            Trial(
                partial(torch.ops.reftserve.rotate, query, key, cosines, sines, dim),
                lambda both=by_head, c=cosines, s=sines: [rotated(heads, c, s) for heads in both],  # type: ignore[misc]
            )
        )
    return trials


def _heads(rows: Tensor, size: int) -> Tensor:
    return rows.view(len(rows), -1, size).transpose(0, 1)
