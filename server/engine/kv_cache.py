"""The paged key-value cache: tensors in blocks of tokens, and the allocator that hands the blocks out.

keys[layer]    [blocks, kv_heads, block_size, head_dim]
values[layer]  the same
block_table    a sequence's blocks in order; token i lies in *slot* block_table[i // size] * size + i % size

Heads lie outside the tokens of a block, so that what is gathered for a head is one dense matrix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """Hands out blocks and takes them back, and finds blocks whose content is wanted again.

    A block has any number of holders. One without holders is free, but keeps its content and key until it is handed
    out anew: the one that was free longest goes first, blocks without a key before all others.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._edited: set[int] = set()
        self._stale: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def find(self, keys: list[bytes]) -> list[int]:
        """Blocks that have the first of these keys, as far as there are any; nothing is taken."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: list[int]) -> int:
        """How many of these blocks nobody holds."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, block_table: list[int], blocks: list[int]) -> None:
        """Hold these blocks, found by their keys, and put them into the table."""
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)
        block_table += blocks

    def extend(self, block_table: list[int], tokens: int) -> bool:
        """Grow the table to hold `tokens` tokens; False, and nothing taken, when too few blocks are free."""
        missing = self.blocks_for(tokens) - len(block_table)
        if missing > len(self._free):
            return False
        block_table += [self._take() for _ in range(missing)]
        return True

    def publish(self, block: int, key: bytes) -> None:
        """The block's content is computed: it can be found by its key, unless another block can be already."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block_table: list[int], *, edited: bool) -> None:
        """Take a table's blocks back and empty it. edited: whether edits may have written to them."""
        if edited:
            self._edited.update(block_table)
        # The end of a chain is of no use without its beginning: it goes first.
        for block in reversed(block_table):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)
        block_table.clear()

    def take_stale(self) -> list[int]:
        """Blocks handed out since the last call that edits may have written to before."""
        stale, self._stale = self._stale, []
        return stale

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._holders[block] = 1
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
        if block in self._edited:
            self._edited.discard(block)
            self._stale.append(block)
        return block


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
        # Zeros, not empty: rows read unwritten slots of their blocks, and a NaN there would survive its zero weight.
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = [torch.zeros(self.num_blocks, s.kv_heads, block_size, s.key_dim, **place) for s in shapes]
        self.values = [torch.zeros(self.num_blocks, s.kv_heads, block_size, s.value_dim, **place) for s in shapes]
        # What `gather` fills. Fresh memory for it in every layer of every step costs more than the copy itself.
        self._workspaces = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def slots(self, block_table: list[int], start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Slots of a sequence's tokens [start, stop), int64."""
        positions = np.arange(start, stop)
        blocks = np.asarray(block_table, dtype=np.int64)
        return blocks[positions // self.block_size] * self.block_size + positions % self.block_size

    def gather(self, layer: int, blocks: PerHead) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks [rows, n] as [rows, kv_heads, n * block_size, dim]; until the next call."""
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
        """What `gather` takes. blocks: [rows, n]."""
        return PerHead(blocks, lambda heads: blocks.unsqueeze(1) * heads + _column(heads, blocks))

    def slots_per_head(self, slots: Tensor) -> PerHead:
        """What `write` takes. slots: [tokens]."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        return PerHead(slots, lambda heads: (blocks * heads + _column(heads, slots)) * self.block_size + offsets)

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks in all layers."""
        index = torch.tensor(blocks, device=self.keys[0].device)
        for store in (*self.keys, *self.values):
            store.view(self.num_blocks, -1).index_fill_(0, index, 0.0)

    def _gather(self, store: Tensor, index: Tensor, workspace: int) -> Tensor:
        by_head = store.view(-1, store.shape[2] * store.shape[3])
        needed = len(index) * by_head.shape[1]
        if self._workspaces[workspace].numel() < needed:
            self._workspaces[workspace] = by_head.new_empty(needed)
        out = self._workspaces[workspace][:needed].view(len(index), -1)
        return torch.index_select(by_head, 0, index, out=out)


class PerHead:
    """Blocks or slots of a step, and where they lie for each key-value head: worked out once for all layers."""

    def __init__(self, indices: Tensor, spread: Callable[[int], Tensor]) -> None:
        self._indices = indices
        self._spread = spread
        self._known: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def indices(self) -> Tensor:
        """Without heads."""
        return self._indices

    def of(self, heads: int) -> Tensor:
        """With `heads` heads, flat."""
        if heads not in self._known:
            self._known[heads] = self._spread(heads).flatten()
        return self._known[heads]


def _column(heads: int, like: Tensor) -> Tensor:
    return torch.arange(heads, device=like.device).unsqueeze(1)
