"""Attention by kernels that read the cache in place: the cache's tensors, and the block tables of each step.

keys[layer]    [blocks + 1, block_size, kv_heads, key_dim]
values[layer]  [blocks + 1, block_size, kv_heads, value_dim]
The token dimension comes before heads, so that a token's keys are contiguous. The last block belongs to no sequence:
padding rows of a recorded decode step write there. Tests without a GPU replace the kernels of triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reftserve.server.base.attention import LayerShape
from reftserve.server.engine.kv_cache.interface import blocks_within, copy_blocks
from reftserve.server.engine.scheduler import Batch, Chunk
from reftserve.server.engine.transfers import to_device


@dataclass(frozen=True)
class PromptRows:
    """The prompt chunks of a step. tables: [chunks, n] int32, blocks of each sequence, with arbitrary padding.

    lengths: [chunks] int32, tokens up to the chunk's end. first_rows: [chunks + 1] int32, first packed row of each
    chunk, and the end. counts: rows of each chunk, on the host.
    """

    tables: Tensor
    lengths: Tensor
    first_rows: Tensor
    counts: NDArray[np.int64]

    def tiles(self, width: int) -> Tensor:
        """Cut chunks into tiles of at most `width` rows; return chunk and first row of each, int32 [2, tiles]."""
        tiles = -(-self.counts // width)
        chunk = np.repeat(np.arange(len(tiles)), tiles)
        row = (np.arange(len(chunk)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * width
        return to_device(np.stack([chunk, row]).astype(np.int32), self.tables.device)


class CudaKernels(Protocol):
    """The device's kernels. keys, values: one layer's; query: [heads, rows, dim]; out: [rows, heads, value_dim]."""

    def store(self, keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write key and value [kv_heads, rows, dim] to slots [rows] int64, `block * block_size + offset`."""
        ...

    def prompts(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: PromptRows,
        tiles: dict[int, Tensor],
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Let each row attend to its sequence up to itself. tiles: `rows.tiles` by width, cached for the step."""
        ...

    def decodes(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Let row i attend to the first lengths[i] tokens in blocks tables[i]; length 0 gives zeros."""
        ...


class CudaCache:
    """The tensors of all layers."""

    def __init__(
        self,
        shapes: list[LayerShape],
        *,
        block_size: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: CudaKernels,
    ) -> None:
        per_block = block_size * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
        self.block_size = block_size
        self.num_blocks = blocks_within(max_bytes, per_block, block_size)
        self.device = device
        self.kernels = kernels
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        blocks = self.num_blocks + 1
        self.keys = [torch.zeros(blocks, block_size, s.kv_heads, s.key_dim, **place) for s in shapes]
        self.values = [torch.zeros(blocks, block_size, s.kv_heads, s.value_dim, **place) for s in shapes]

    @property
    def scratch_slot(self) -> int:
        """Return a slot that may be written and is never read."""
        return self.num_blocks * self.block_size

    def step(self, batch: Batch) -> CudaStep:
        """Return the attention of this batch."""
        slots = to_device(np.concatenate([self.slots(chunk) for chunk in batch.chunks]), self.device)
        prompts = decodes = None
        if batch.prefills:
            counts = np.array([chunk.stop - chunk.start for chunk in batch.prefills])
            first_rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            tables, lengths = (to_device(array, self.device) for array in self.tables(batch.prefills))
            prompts = PromptRows(tables, lengths, to_device(first_rows, self.device), counts)
        if batch.decodes:
            tables, lengths = (to_device(array, self.device) for array in self.tables(batch.decodes))
            decodes = DecodeRows(tables, lengths)
        return CudaStep(self, slots, prompts, decodes)

    def clear(self, blocks: list[int]) -> None:
        """Do nothing: the kernels never read a slot that the sequence has not written."""

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks in all layers."""
        copy_blocks((*self.keys, *self.values), blocks)

    def slots(self, chunk: Chunk) -> NDArray[np.int64]:
        """Return the slots of a chunk's tokens."""
        positions = np.arange(chunk.start, chunk.stop)
        blocks = np.asarray(chunk.sequence.block_table, dtype=np.int64)
        return blocks[positions // self.block_size] * self.block_size + positions % self.block_size

    def tables(self, chunks: list[Chunk]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return blocks up to each chunk's end, [chunks, n] padded with 0, and tokens up to it, [chunks]."""
        lengths = np.array([chunk.stop for chunk in chunks], dtype=np.int32)
        counts = -(-lengths // self.block_size)
        tables = np.zeros((len(chunks), counts.max()), dtype=np.int32)
        for row, chunk, count in zip(tables, chunks, counts, strict=True):
            row[:count] = chunk.sequence.block_table[:count]
        return tables, lengths


@dataclass(frozen=True)
class DecodeRows:
    """The decode tokens of a step: tables [rows, n] int32, lengths [rows] int32."""

    tables: Tensor
    lengths: Tensor


class CudaStep:
    """Attention of one step: prompt rows first, then decode rows. slots: [rows] int64, where new tokens are stored."""

    def __init__(self, cache: CudaCache, slots: Tensor, prompts: PromptRows | None, decodes: DecodeRows | None) -> None:
        self._cache, self._slots, self._prompts, self._decodes = cache, slots, prompts, decodes
        self._tiles: dict[int, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Store the step's keys and values, then attend."""
        keys, values, kernels = self._cache.keys[layer], self._cache.values[layer], self._cache.kernels
        kernels.store(keys, values, self._slots, key, value)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        first = 0
        if self._prompts is not None:
            first = int(self._prompts.counts.sum())
            kernels.prompts(query[:, :first], keys, values, self._prompts, self._tiles, scale, window, out[:first])
        if self._decodes is not None:
            rows = self._decodes
            kernels.decodes(query[:, first:], keys, values, rows.tables, rows.lengths, scale, window, out[first:])
        return out
