"""Hands out the blocks of the key-value cache, and finds those whose content is wanted again.

block_table: a sequence's blocks in order; its token i lies in block block_table[i // block_size] at i % block_size.
"""

from __future__ import annotations

from collections import OrderedDict


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
