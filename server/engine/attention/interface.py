"""The contract between transformers' attention and the paged cache, registered with its AttentionInterface.

A step packs all its tokens into one row, prompt chunks first, then decode tokens. The cache makes an `AttentionStep` of
each batch; for each layer of the forward pass it stores the new keys and values, and lets every token attend to those
of its own sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reftserve.server.engine.errors import EngineError, UnsupportedModel
from reftserve.server.engine.scheduler import Batch
from reftserve.server.engine.transfers import indices

ATTENTION = "reftserve_paged"


@dataclass(frozen=True)
class LayerShape:
    """Heads and sizes of one layer's keys and values, as its attention produces them."""

    kv_heads: int
    key_dim: int
    value_dim: int


class AttentionStep(Protocol):
    """What attention does during one forward pass."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Store keys and values, then attend: [heads, tokens, dim] -> [tokens, heads, value_dim].

        scale: of the scores, None is dim^-1/2. window: a token sees itself and window - 1 before it; None is all.
        """
        ...


class KVCache(Protocol):
    """Keys and values of all layers in blocks of tokens, allocated once."""

    num_blocks: int
    block_size: int

    def step(self, batch: Batch) -> AttentionStep:
        """Attention for this batch."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """Make sure that what these blocks held can reach nobody (`Batch.stale_blocks`)."""
        ...

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in all layers; none is both."""
        ...


def copy_blocks(stores: Iterable[Tensor], blocks: list[tuple[int, int]]) -> None:
    """`KVCache.copy` for tensors whose first dimension is blocks."""
    sources, targets = zip(*blocks, strict=True)
    for store in stores:
        store.index_copy_(0, indices(targets, store.device), store[indices(sources, store.device)])


def blocks_within(max_bytes: int, bytes_per_block: int, block_size: int) -> int:
    """How many blocks fit. Raises EngineError when none does."""
    if max_bytes < bytes_per_block:
        raise EngineError(f"kv_cache_bytes is {max_bytes}; one block of {block_size} tokens takes {bytes_per_block}")
    return max_bytes // bytes_per_block


_step: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Forward passes inside use `step` for their attention."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> AttentionStep:
    """What attention does in the forward pass under way."""
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
    """Transformers' attention signature: query [1, heads, tokens, dim] -> [1, tokens, heads, value_dim]."""
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("attention with logit soft-capping or sinks is not served yet")
    layer: int = module.layer_idx  # type: ignore[assignment]
    return current_step().attend(layer, query[0], key[0], value[0], scaling, sliding_window).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)


@dataclass
class ShapeProbe:
    """A step that only learns the shapes of each layer's keys and values."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Record the shapes; answer with plain causal attention."""
        self.shapes[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1])
        return sdpa(query, key, value, None, scale, is_causal=True).transpose(0, 1)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, *, is_causal: bool
) -> Tensor:
    """Torch's attention of one sequence, [heads, tokens, dim], fewer key-value heads than query heads allowed."""
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
