"""The kernel that only training uses: attention to kept prefixes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from reftserve.server.base.attention import AttentionStep
from reftserve.server.base.kernel_choice import ROWS, KernelChoice, Trial
from reftserve.server.base.replacement import random_rows
from reftserve.server.datasets import EncodedExample
from reftserve.server.training.spans import Span, VarlenRows
from reftserve.server.training.varlen_attention import SpanAttention, VarlenAttention

KEPT, COMPUTED = 64, 4  # tokens of each example


@dataclass(frozen=True)
class _Kept:
    before: Tensor
    spans: int

    def of(self, layer: int) -> Sequence[Tensor]:
        return [self.before] * self.spans


def takes_span_attention(kernels: KernelChoice, config: PretrainedConfig) -> bool:
    """Return whether the kernel computes attention where prefixes are kept."""
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kernels.takes("span_attention", f"{heads}/{kv_heads}x{dim}", lambda: _trials(heads, kv_heads, dim))


@torch.inference_mode(False)  # the trials include a backward pass
def _trials(heads: int, kv_heads: int, dim: int) -> list[Trial]:
    example = EncodedExample((0,) * KEPT, (0,) * (COMPUTED + 1))
    trials = []
    for spans in ROWS:
        rows = VarlenRows([Span(example, KEPT, KEPT + COMPUTED)] * spans, torch.device("cpu"))
        kept = _Kept(random_rows(dim, 2 * kv_heads * KEPT).view(2, kv_heads, KEPT, dim), spans)
        tensors = [
            random_rows(dim, count * spans * COMPUTED).view(count, -1, dim).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        ]
        forms = (_there_and_back(step, tensors) for step in (SpanAttention(rows, kept), VarlenAttention(rows, kept)))
        trials.append(Trial(*forms))
    return trials


def _there_and_back(step: AttentionStep, tensors: Sequence[Tensor]) -> Callable[[], object]:
    query, key, value = tensors

    @torch.inference_mode(False)
    def run() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(step.attend(0, query, key, value, None, None).sum(), tensors)

    return run
