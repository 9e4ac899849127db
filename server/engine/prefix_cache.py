"""Keys of the cache's blocks: a hash chain over tokens and the edits on them. Blocks with equal keys are shared.

    key_i = H("block", key_{i-1}, token ids of block i, [(edits, scale, first offset, end), ...] in composition order)
    key_{-1} = H("root", salt);  edits = digest of an intervention's content hash and of its edits on a run of tokens
A token's keys and values depend only on the tokens up to it and on their edits. So an intervention that edits only the
last prompt tokens shares all earlier blocks with the base and with other interventions of this kind. The root leaves
out model and dtype, because a cache never outlives its process.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import defaultdict

from reftserve.interventions import Intervention
from reftserve.interventions.edited_runs import EditedRun

KEY_BYTES = 32
ROOT, BLOCK = b"root\0", b"block"  # no salt gives the key of a block
_SCALE, _OFFSETS = struct.Struct("<d"), struct.Struct("<II")


class BlockKeys:
    """The keys of one sequence's full blocks, computed as its tokens arrive. salt: only equal salts share blocks."""

    def __init__(
        self, salt: str, interventions: tuple[tuple[Intervention, float], ...], n_prompt: int, block_size: int
    ) -> None:
        self._block_size = block_size
        # In composition order; runs that the computed keys cover are dropped.
        self._runs = [
            EditedRun(run.start, run.stop, run.edits + _SCALE.pack(scale))
            for intervention, scale in interventions
            for run in intervention.edited_runs.of(n_prompt)
        ]
        self._parent = _digest(ROOT + salt.encode())
        self._keys: list[bytes] = []

    def of(self, token_ids: list[int], count: int) -> list[bytes]:
        """Return the keys of the first `count` blocks, which are full. token_ids: may only grow between calls."""
        first, size = len(self._keys), self._block_size
        if count > first:
            tokens = array("i", token_ids[first * size : count * size])
            content, width = tokens.tobytes(), size * tokens.itemsize
            edits = self._edits(first, count)
            for index in range(first, count):
                start = (index - first) * width
                block = BLOCK + self._parent + content[start : start + width]
                self._parent = _digest(block + edits[index] if index in edits else block)
                self._keys.append(self._parent)
        return self._keys[:count]

    def _edits(self, first: int, count: int) -> dict[int, bytes]:
        """Return the edits on each edited block in [first, count)."""
        size = self._block_size
        found: defaultdict[int, bytes] = defaultdict(bytes)
        for begin, end, edits in self._runs:
            for index in range(max(begin // size, first), min(-(-end // size), count)):
                start = index * size
                found[index] += edits + _OFFSETS.pack(max(begin - start, 0), min(end - start, size))
        self._runs = [run for run in self._runs if run.stop > count * size]
        return found


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
