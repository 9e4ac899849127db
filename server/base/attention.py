"""The contract for the attention of a forward pass, registered with transformers' AttentionInterface. A pass packs the
tokens of many sequences into one row. Its caller's `AttentionStep` lets each token attend to its own sequence: in the
engine over the paged KV cache (`engine/kv_cache/`), in training over cached prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reftserve.server.base.model_errors import UnsupportedModel

ATTENTION = "reftserve_paged"


@dataclass(frozen=True)
class LayerShape:
    """The number of heads and the sizes of one layer's keys and values."""

    kv_heads: int
    key_dim: int
    value_dim: int


class AttentionStep(Protocol):
    """The attention of one forward pass."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Store keys and values, then attend: [heads, tokens, dim] -> [tokens, heads, value_dim].

        scale: of the scores; None is dim^-1/2. window: a token sees itself and window - 1 earlier ones; None is all.
        """
        ...


_step: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Use `step` as the attention of forward passes while the context is open."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> AttentionStep:
    """Return the attention of the current forward pass."""
    return _step.get()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend with transformers' signature: query [1, heads, tokens, dim] -> [1, tokens, heads, value_dim]."""
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("attention with logit soft-capping or sinks is not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    return current_step().attend(layer, query[0], key[0], value[0], scaling, sliding_window).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)


@dataclass
class ShapeProbe:
    """A step that records the shapes of each layer's keys and values."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Record the shapes and compute causal attention."""
        self.shapes[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1])
        return sdpa(query, key, value, None, scale, is_causal=True).transpose(0, 1)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, *, is_causal: bool
) -> Tensor:
    """Compute torch's attention of one sequence, [heads, tokens, dim]; keys may have fewer heads than queries."""
    out = scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0]
