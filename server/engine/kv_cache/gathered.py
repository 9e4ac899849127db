"""Attention for any device and dtype: gathers the blocks of each sequence, then runs torch's attention over them.

Keys and values of a layer are [blocks, kv_heads, block_size, dim]: gathering a head's blocks gives one dense matrix.
Prompt chunks attend one by one; decode tokens attend together, padded to the longest. On the CPU in float32 they use
two batched products around a softmax, which is faster for few rows than the fused kernel, made for long queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reftserve.server.base.attention import LayerShape, sdpa
from reftserve.server.engine.kv_cache.interface import blocks_within, copy_blocks
from reftserve.server.engine.scheduler import Batch, Chunk
from reftserve.server.engine.transfers import indices, to_device


@dataclass(frozen=True)
class _Prefill:
    """A prompt chunk: its packed rows, its positions, and the blocks [1, n] up to its end."""

    rows: slice
    start: int
    stop: int
    blocks: PerHead


class GatheredCache:
    """The tensors of all layers, read by block and written by slot."""

    def __init__(
        self,
        shapes: list[LayerShape],
        *,
        block_size: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        per_block = block_size * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
        self.block_size = block_size
        self.num_blocks = blocks_within(max_bytes, per_block, block_size)
        self.device = device
        # Zeros, because rows read unwritten slots of their blocks with weight zero, which a NaN would survive.
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = [torch.zeros(self.num_blocks, s.kv_heads, block_size, s.key_dim, **place) for s in shapes]
        self.values = [torch.zeros(self.num_blocks, s.kv_heads, block_size, s.value_dim, **place) for s in shapes]
        # Output buffers of `gather`. Allocating them in every layer and step costs more than the copy.
        self._workspaces = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def step(self, batch: Batch) -> GatheredStep:
        """Return the attention of this batch."""
        return GatheredStep(batch, self)

    def slots(self, block_table: list[int], start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the slots of a sequence's tokens [start, stop), int64."""
        positions = np.arange(start, stop)
        blocks = np.asarray(block_table, dtype=np.int64)
        return blocks[positions // self.block_size] * self.block_size + positions % self.block_size

    def gather(self, layer: int, blocks: PerHead) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, kv_heads, n * block_size, dim] of blocks [rows, n], until the next call."""
        heads = self.keys[layer].shape[1]
        keys, values = (
            self._gather(store[layer], blocks.of(heads), workspace).view(len(blocks), heads, -1, store[layer].shape[-1])
            for workspace, store in enumerate((self.keys, self.values))
        )
        return keys, values

    def write(self, layer: int, slots: PerHead, key: Tensor, value: Tensor) -> None:
        """Store keys and values [kv_heads, tokens, dim] in their slots [tokens]."""
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            store.view(-1, store.shape[-1]).index_copy_(0, slots.of(len(new)), new.reshape(-1, new.shape[-1]))

    def blocks_per_head(self, blocks: Tensor) -> PerHead:
        """Return blocks [rows, n] in the form that `gather` takes."""
        return PerHead(blocks, lambda heads: blocks.unsqueeze(1) * heads + _column(heads, blocks))

    def slots_per_head(self, slots: Tensor) -> PerHead:
        """Return slots [tokens] in the form that `write` takes."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        return PerHead(slots, lambda heads: (blocks * heads + _column(heads, slots)) * self.block_size + offsets)

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks in all layers."""
        index = indices(blocks, self.device)
        for store in (*self.keys, *self.values):
            store.view(self.num_blocks, -1).index_fill_(0, index, 0.0)

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks in all layers."""
        copy_blocks((*self.keys, *self.values), blocks)

    def _gather(self, store: Tensor, index: Tensor, workspace: int) -> Tensor:
        by_head = store.view(-1, store.shape[2] * store.shape[3])
        needed = len(index) * by_head.shape[1]
        if self._workspaces[workspace].numel() < needed:
            self._workspaces[workspace] = by_head.new_empty(needed)
        out = self._workspaces[workspace][:needed].view(len(index), -1)
        return torch.index_select(by_head, 0, index, out=out)


class GatheredStep:
    """Attention of one step's batch against the cache."""

    def __init__(self, batch: Batch, cache: GatheredCache) -> None:
        self.cache, device = cache, cache.device
        slots = [cache.slots(c.sequence.block_table, c.start, c.stop) for c in batch.chunks]
        self.new_slots = cache.slots_per_head(to_device(np.concatenate(slots), device))
        self.prefills: list[_Prefill] = []
        offset = 0
        for chunk in batch.prefills:
            rows = slice(offset, offset + chunk.stop - chunk.start)
            self.prefills.append(_Prefill(rows, chunk.start, chunk.stop, self._blocks([chunk], device)))
            offset = rows.stop
        self.decode_rows = slice(offset, offset + len(batch.decodes))
        if batch.decodes:
            self.decode_blocks = self._blocks(batch.decodes, device)
            self.decode_lengths = indices([chunk.stop for chunk in batch.decodes], device)
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
            out[:, prefill.rows] = sdpa(
                query[:, prefill.rows],
                keys[0, :, : prefill.stop],
                values[0, :, : prefill.stop],
                mask,
                scale,
                is_causal=mask is None,
            )
        if self.decode_rows.start < self.decode_rows.stop:
            out[:, self.decode_rows] = self._decode(layer, query[:, self.decode_rows], scale, window)
        return out.transpose(0, 1)

    def _decode(self, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
        heads, rows, dim = query.shape
        keys, values = self.cache.gather(layer, self.decode_blocks)
        kv_heads = keys.shape[1]
        # Query heads of one key-value head take the place of query tokens, so that keys are not repeated.
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
        """Return the decode rows' mask as a bias on scores, [rows * kv_heads, 1, width]."""
        if (kv_heads, window) not in self._biases:
            mask = self._mask(len(self.prefills), window)
            assert mask is not None  # noqa: S101 - decode rows always have one
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._biases[kv_heads, window] = bias.expand(-1, kv_heads, -1, -1).flatten(0, 1)
        return self._biases[kv_heads, window]

    def _blocks(self, chunks: list[Chunk], device: torch.device) -> PerHead:
        """Return the blocks up to each chunk's end, [chunks, n]. Padding is the row's own: 0 * another's inf is NaN."""
        size = self.cache.block_size
        counts = [-(-chunk.stop // size) for chunk in chunks]
        blocks = np.empty((len(chunks), max(counts)), dtype=np.int64)
        for row, chunk, count in zip(blocks, chunks, counts, strict=True):
            row[:count] = chunk.sequence.block_table[:count]
            row[count:] = row[0]
        return self.cache.blocks_per_head(to_device(blocks, device))

    def _mask(self, index: int, window: int | None) -> Tensor | None:
        """Return the attention mask of prefill `index`, or of the decode rows, which come last; None is causal."""
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


class PerHead:
    """Blocks or slots of a step, with their indices for each key-value head, computed once for all layers."""

    def __init__(self, indices: Tensor, spread: Callable[[int], Tensor]) -> None:
        self._indices = indices
        self._spread = spread
        self._known: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def indices(self) -> Tensor:
        """Return the indices without heads."""
        return self._indices

    def of(self, heads: int) -> Tensor:
        """Return the flat indices for `heads` heads."""
        if heads not in self._known:
            self._known[heads] = self._spread(heads).flatten()
        return self._known[heads]


def _column(heads: int, like: Tensor) -> Tensor:
    return torch.arange(heads, device=like.device).unsqueeze(1)
