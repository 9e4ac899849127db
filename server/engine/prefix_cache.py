"""Keys of the cache's blocks: a hash chain over tokens and the edits on them. Blocks with equal keys are shared.

    key_i = H(key_{i-1}, token ids of block i, [(edit, scale, edited offsets), ...] in composition order)
    key_{-1} = H(salt);  edit = the intervention's content hash and the edit's number in it
A token's keys and values depend only on the tokens up to it and on their edits. So an intervention that edits only the
last prompt tokens shares all earlier blocks with the base and with other interventions of this kind. The root leaves
out model and dtype, because a cache never outlives its process.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from reftserve.interventions import Intervention

KEY_BYTES = 32


class BlockKeys:
    """The keys of one sequence's full blocks, computed as its tokens arrive. salt: only equal salts share blocks."""

    def __init__(
        self, salt: str, interventions: tuple[tuple[Intervention, float], ...], n_prompt: int, block_size: int
    ) -> None:
        self._interventions = interventions
        self._n_prompt = n_prompt
        self._block_size = block_size
        self._root = _digest(b"", salt.encode())
        self._keys: list[bytes] = []

    def of(self, token_ids: list[int], count: int) -> list[bytes]:
        """Return the keys of the first `count` blocks, which are full. token_ids: may only grow between calls."""
        size = self._block_size
        for index in range(len(self._keys), count):
            start, stop = index * size, (index + 1) * size
            tokens = np.asarray(token_ids[start:stop], dtype=np.int64).tobytes()
            parent = self._keys[-1] if self._keys else self._root
            self._keys.append(_digest(parent, tokens + self._edits(start, stop)))
        return self._keys[:count]

    def _edits(self, start: int, stop: int) -> bytes:
        parts = []
        for intervention, scale in self._interventions:
            for number, site in enumerate(intervention.sites):
                offsets = site.positions.indices(self._n_prompt, start, stop) - start
                if len(offsets):
                    edit = bytes.fromhex(intervention.content_hash) + struct.pack("<q", number)
                    parts.append(edit + struct.pack("<dq", scale, len(offsets)) + offsets.tobytes())
        return b"".join(parts)


def _digest(parent: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(parent + content, digest_size=KEY_BYTES).digest()
