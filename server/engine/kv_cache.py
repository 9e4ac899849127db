"""The paged key-value cache: tensors in blocks of tokens, and the allocator that hands the blocks out.

keys[layer]    [blocks * block_size, kv_heads, head_dim]      one row is the key of one token: a *slot*
values[layer]  the same
block_table    a sequence's blocks in order; token i lies in slot block_table[i // size] * size + i % size
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reftserve.server.engine.errors import EngineError


@dataclass(frozen=True)
class LayerShape:
    """Heads and sizes of one layer's keys and values, as its attention produces them."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        """Numbers kept for one token at this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class BlockAllocator:
    """Hands out block numbers and takes them back; who holds which is the sequences' business."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def extend(self, block_table: list[int], tokens: int) -> bool:
        """Grow the table to hold `tokens` tokens; False, and nothing taken, when too few blocks are free."""
        missing = self.blocks_for(tokens) - len(block_table)
        if missing > len(self._free):
            return False
        if missing > 0:
            block_table += self._free[-missing:]
            del self._free[-missing:]
        return True

    def release(self, block_table: list[int]) -> None:
        """Take all of a table's blocks back and empty it."""
        self._free.extend(reversed(block_table))
        block_table.clear()


class KVCache:
    """The tensors, all layers, allocated once."""

    def __init__(
        self,
        shapes: list[LayerShape],
        *,
        block_size: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        bytes_per_block = block_size * sum(shape.elements_per_token for shape in shapes) * dtype.itemsize
        self.block_size = block_size
        self.num_blocks = max_bytes // bytes_per_block
        if self.num_blocks < 1:
            raise EngineError(
                f"kv_cache_bytes is {max_bytes}; one block of {block_size} tokens takes {bytes_per_block}"
            )
        slots = self.num_blocks * block_size
        # Zeros, not empty: rows read unwritten slots of their blocks, and a NaN there would survive its zero weight.
        self.keys = [torch.zeros(slots, s.kv_heads, s.key_dim, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.zeros(slots, s.kv_heads, s.value_dim, dtype=dtype, device=device) for s in shapes]
        # What `gather` fills. Fresh memory for it in every layer of every step costs more than the copy itself.
        self._workspaces = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def slots(self, block_table: list[int], start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Slots of a sequence's tokens [start, stop), int64."""
        positions = np.arange(start, stop)
        blocks = np.asarray(block_table, dtype=np.int64)
        return blocks[positions // self.block_size] * self.block_size + positions % self.block_size

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks [rows, n] as [rows, n * block_size, kv_heads, dim]; until the next call."""
        keys, values = (
            self._gather(store[layer], blocks.flatten(), workspace).view(len(blocks), -1, *store[layer].shape[1:])
            for workspace, store in enumerate((self.keys, self.values))
        )
        return keys, values

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, dim] in their slots [tokens]."""
        self.keys[layer].index_copy_(0, slots, key)
        self.values[layer].index_copy_(0, slots, value)

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks in all layers."""
        index = torch.tensor(blocks, device=self.keys[0].device)
        for store in (*self.keys, *self.values):
            store.view(self.num_blocks, -1).index_fill_(0, index, 0.0)

    def _gather(self, store: Tensor, blocks: Tensor, workspace: int) -> Tensor:
        by_block = store.view(self.num_blocks, -1)
        needed = len(blocks) * by_block.shape[1]
        if self._workspaces[workspace].numel() < needed:
            self._workspaces[workspace] = by_block.new_empty(needed)
        out = self._workspaces[workspace][:needed].view(len(blocks), -1)
        return torch.index_select(by_block, 0, blocks, out=out)
