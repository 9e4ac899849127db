"""The contract of a paged KV cache: blocks of tokens for all layers, and the attention of one batch over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from reftserve.server.base.attention import AttentionStep
from reftserve.server.engine.engine_errors import EngineError
from reftserve.server.engine.scheduler import Batch
from reftserve.server.engine.transfers import indices


class KVCache(Protocol):
    """Keys and values of all layers in blocks of tokens, allocated once."""

    num_blocks: int
    block_size: int

    def step(self, batch: Batch) -> AttentionStep:
        """Return the attention of this batch."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """Ensure that the old content of these blocks cannot reach a sequence (`Batch.stale_blocks`)."""
        ...

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in all layers; sources and targets are disjoint."""
        ...


def copy_blocks(stores: Iterable[Tensor], blocks: list[tuple[int, int]]) -> None:
    """Copy blocks, (from, to), in tensors whose first dimension is blocks."""
    sources, targets = zip(*blocks, strict=True)
    for store in stores:
        store.index_copy_(0, indices(targets, store.device), store[indices(sources, store.device)])


def blocks_within(max_bytes: int, bytes_per_block: int, block_size: int) -> int:
    """Return how many blocks fit into max_bytes. Raises EngineError when none does."""
    if max_bytes < bytes_per_block:
        raise EngineError(f"kv_cache_bytes is {max_bytes}; one block of {block_size} tokens takes {bytes_per_block}")
    return max_bytes // bytes_per_block
