"""Attention over the paged cache, registered with transformers' AttentionInterface: models run unpatched.

A step packs all its tokens into one row, prompt chunks first, then decode tokens. For each layer the function stores
the new keys and values in their slots, lets each prompt chunk attend to its own sequence, and lets all decode tokens
attend at once to their sequences' slots, padded to the longest.

On the CPU in float32 the decode rows' attention is two batched products around a softmax: for a query of a few rows
that is faster than the fused kernel, which is made for long ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reftserve.server.engine.errors import UnsupportedModel
from reftserve.server.engine.kv_cache import KVCache, LayerShape, PerHead
from reftserve.server.engine.scheduler import Batch, Chunk

ATTENTION = "reftserve_paged"


class AttentionStep(Protocol):
    """What attention does during one forward pass. Tensors are [heads, tokens, head_dim]."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention's output, [heads, tokens, value_dim]."""
        ...


_step: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Forward passes inside use `step` for their attention."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


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
    """Transformers' attention signature: query [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("attention with logit soft-capping or sinks is not served yet")
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = _step.get().attend(layer, query[0], key[0], value[0], scaling, sliding_window)
    return out.transpose(0, 1).unsqueeze(0), None


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
        return _sdpa(query, key, value, None, scale, is_causal=True)


@dataclass(frozen=True)
class _Prefill:
    """A prompt chunk: its packed rows, its positions, and the blocks [1, n] of all tokens up to its end."""

    rows: slice
    start: int
    stop: int
    blocks: PerHead


class PagedStep:
    """Attention of one step's batch against the cache."""

    def __init__(self, batch: Batch, cache: KVCache, device: torch.device) -> None:
        self.cache = cache
        slots = [cache.slots(c.sequence.block_table, c.start, c.stop) for c in batch.chunks]
        self.new_slots = cache.slots_per_head(torch.from_numpy(np.concatenate(slots)).to(device))
        self.prefills: list[_Prefill] = []
        offset = 0
        for chunk in batch.prefills:
            rows = slice(offset, offset + chunk.stop - chunk.start)
            self.prefills.append(_Prefill(rows, chunk.start, chunk.stop, self._blocks([chunk], device)))
            offset = rows.stop
        self.decode_rows = slice(offset, offset + len(batch.decodes))
        if batch.decodes:
            self.decode_blocks = self._blocks(batch.decodes, device)
            self.decode_lengths = torch.tensor([chunk.stop for chunk in batch.decodes], device=device)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._biases: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Store the step's keys and values, then attend."""
        self.cache.write(layer, self.new_slots, key, value)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        for index, prefill in enumerate(self.prefills):
            mask = self._mask(index, window)
            keys, values = self.cache.gather(layer, prefill.blocks)
            out[:, prefill.rows] = _sdpa(
                query[:, prefill.rows],
                keys[0, :, : prefill.stop],
                values[0, :, : prefill.stop],
                mask,
                scale,
                is_causal=mask is None,
            )
        if self.decode_rows.start < self.decode_rows.stop:
            out[:, self.decode_rows] = self._decode(layer, query[:, self.decode_rows], scale, window)
        return out

    def _decode(self, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
        heads, rows, dim = query.shape
        keys, values = self.cache.gather(layer, self.decode_blocks)
        kv_heads = keys.shape[1]
        # Query heads that share a key-value head stand in the place of query tokens: no repeated keys.
        grouped = query.transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, dim)
        if query.device.type == "cpu" and query.dtype == torch.float32:
            scores = torch.baddbmm(
                self._bias(kv_heads, window),
                grouped.flatten(0, 1),
                keys.flatten(0, 1).transpose(1, 2),
                alpha=dim**-0.5 if scale is None else scale,
            )
            out = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))
        else:
            mask = self._mask(len(self.prefills), window)
            out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(rows, heads, -1).transpose(0, 1)

    def _bias(self, kv_heads: int, window: int | None) -> Tensor:
        """The decode rows' mask as what is added to scores, [rows * kv_heads, 1, width]."""
        if (kv_heads, window) not in self._biases:
            mask = self._mask(len(self.prefills), window)
            assert mask is not None  # noqa: S101 - decode rows always have one
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._biases[kv_heads, window] = bias.expand(-1, kv_heads, -1, -1).flatten(0, 1)
        return self._biases[kv_heads, window]

    def _blocks(self, chunks: list[Chunk], device: torch.device) -> PerHead:
        """The sequences' blocks up to the chunks' ends, [chunks, n].

        Rows are padded with a block of their own, which masks hide: what they hide is multiplied by zero all the same,
        and a number in a strange block may not be finite.
        """
        size = self.cache.block_size
        counts = [-(-chunk.stop // size) for chunk in chunks]
        blocks = np.empty((len(chunks), max(counts)), dtype=np.int64)
        for row, chunk, count in zip(blocks, chunks, counts, strict=True):
            row[:count] = chunk.sequence.block_table[:count]
            row[count:] = row[0]
        return self.cache.blocks_per_head(torch.from_numpy(blocks).to(device))

    def _mask(self, index: int, window: int | None) -> Tensor | None:
        """Who may look at whom in prefill `index` (the decode rows come last); None is plain causal."""
        if (index, window) not in self._masks:
            self._masks[index, window] = self._build_mask(index, window)
        return self._masks[index, window]

    def _build_mask(self, index: int, window: int | None) -> Tensor | None:
        if index == len(self.prefills):
            width = self.decode_blocks.indices.shape[1] * self.cache.block_size
            key = torch.arange(width, device=self.decode_lengths.device)
            lengths = self.decode_lengths.unsqueeze(1)
            mask = key < lengths
            if window is not None:
                mask &= key >= lengths - window
            return mask[:, None, None, :]
        prefill = self.prefills[index]
        if prefill.start == 0 and (window is None or prefill.stop <= window):
            return None
        query = torch.arange(prefill.start, prefill.stop, device=prefill.blocks.indices.device).unsqueeze(1)
        key = torch.arange(prefill.stop, device=prefill.blocks.indices.device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        return mask


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, *, is_causal: bool
) -> Tensor:
    """Attention of one sequence; [heads, tokens, dim] with fewer key-value heads than query heads allowed."""
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
