"""Attention in float32 on the CPU: the kernel in cpu_kernels/attention.cpp reads the cache in place.

keys[layer]    [blocks, kv_heads, key_dim, block_size]     transposed, so that one instruction reads sixteen keys
values[layer]  [blocks, kv_heads, block_size, value_dim]   block_size and value_dim are padded to multiples of sixteen
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reftserve.server.base.attention import LayerShape
from reftserve.server.engine.kv_cache.interface import blocks_within, copy_blocks
from reftserve.server.engine.scheduler import Batch

VECTOR = 16


class CpuCache:
    """The tensors of all layers."""

    def __init__(self, shapes: list[LayerShape], *, block_size: int, max_bytes: int) -> None:
        self.block_size = block_size
        size = _padded(block_size)
        per_block = sum(s.kv_heads * size * (s.key_dim + _padded(s.value_dim)) for s in shapes) * torch.float32.itemsize
        self.num_blocks = blocks_within(max_bytes, per_block, block_size)
        # Zeros, because a value's padding is multiplied by weights too.
        self.keys = [torch.zeros(self.num_blocks, s.kv_heads, s.key_dim, size) for s in shapes]
        self.values = [torch.zeros(self.num_blocks, s.kv_heads, size, _padded(s.value_dim)) for s in shapes]

    def step(self, batch: Batch) -> CpuStep:
        """Return the attention of this batch."""
        return CpuStep(batch, self)

    def clear(self, blocks: list[int]) -> None:
        """Do nothing: the kernel never reads a slot that the sequence has not written."""

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks in all layers."""
        copy_blocks((*self.keys, *self.values), blocks)


class CpuStep:
    """Attention of one step's batch against the cache."""

    def __init__(self, batch: Batch, cache: CpuCache) -> None:
        self._cache = cache
        chunks = batch.chunks
        counts = [-(-chunk.stop // cache.block_size) for chunk in chunks]
        tables = np.zeros((len(chunks), max(counts)), dtype=np.int64)
        for row, chunk, count in zip(tables, chunks, counts, strict=True):
            row[:count] = chunk.sequence.block_table[:count]
        rows = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum([chunk.stop - chunk.start for chunk in chunks], out=rows[1:])
        self._tables, self._rows = torch.from_numpy(tables), torch.from_numpy(rows)
        self._starts = torch.tensor([chunk.start for chunk in chunks])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Store the step's keys and values, then attend."""
        out: Tensor = torch.ops.reftserve.paged_attention(
            query,
            key,
            value,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._tables,
            self._rows,
            self._starts,
            self._cache.block_size,
            query.shape[-1] ** -0.5 if scale is None else scale,
            window or 0,
        )
        return out


def _padded(size: int) -> int:
    return -(-size // VECTOR) * VECTOR
