"""Allocates the blocks of the key-value cache, and finds blocks by the key of their content.

Only the sequence that took a block (`extend`) writes into it, behind its computed tokens. A full block may have other
holders: requests that find it by its key (`publish`), and the sequence's forks, which need no key.
Token i of a sequence is in block block_table[i // block_size] at offset i % block_size.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockAllocator:
    """Counts each block's holders. Free ones keep their content until reuse: keyless blocks first, then the oldest."""

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
        """Return the number of blocks without a holder."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def find(self, keys: list[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of these keys; holders do not change."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: list[int]) -> int:
        """Return how many of these blocks have no holder."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, block_table: list[int], blocks: list[int]) -> None:
        """Append found blocks to the table and hold them."""
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)
        block_table += blocks

    def extend(self, block_table: list[int], tokens: int) -> bool:
        """Grow the table to `tokens` tokens; return False and take nothing when too few blocks are free."""
        missing = self.blocks_for(tokens) - len(block_table)
        if missing > len(self._free):
            return False
        block_table += [self._take() for _ in range(missing)]
        return True

    def publish(self, block: int, key: bytes) -> None:
        """Let a computed block be found by its key, unless another block already has the key."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block_table: list[int], *, edited: bool) -> None:
        """Release a table's blocks and empty it. edited: whether edits may have written to them."""
        if edited:
            self._edited.update(block_table)
        # The end of a chain is useless without its beginning, so it is reused first.
        for block in reversed(block_table):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)
        block_table.clear()

    def distrust(self, blocks: list[int]) -> None:
        """Treat these blocks as if edits had written to them."""
        self._edited.update(blocks)

    def take_stale(self) -> list[int]:
        """Return the blocks allocated since the last call that edits may have written to before."""
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
