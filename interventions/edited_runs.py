"""Which of an intervention's edits touch which tokens, as runs of tokens that the same edits touch.

    sites  f7+l7, f7+l7, l1     n_prompt 20     runs  [0, 7) {0, 1}   [13, 19) {0, 1}   [19, 20) {0, 1, 2}
A set of edits is a digest, so that equal sets are equal bytes wherever they are. `f` edits a prompt's first half, `l`
its last half: there the sets are nested, one for each distinct number, computed once for an intervention.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from reftserve.interventions.positions import Positions

ENDLESS = sys.maxsize
DIGEST_BYTES = 32


class EditedRun(NamedTuple):
    """The tokens [start, stop) of a request, and the digest of the edits that touch each of them."""

    start: int
    stop: int
    edits: bytes


class EditedRuns:
    """The runs of one intervention. content_hash: its identity; positions: those of its edits, in order."""

    def __init__(self, content_hash: str, positions: Sequence[Positions]) -> None:
        self._identity = bytes.fromhex(content_hash)
        self._set_bytes = -(-len(positions) // 8)
        prompt = sum(1 << number for number, each in enumerate(positions) if each.prompt)
        generated = sum(1 << number for number, each in enumerate(positions) if each.generated)
        self._first = self._nested([each.first for each in positions], prompt)
        self._last = self._nested([each.last for each in positions], prompt)
        self._prompt = self._digest(prompt) if prompt else None
        self._generated = self._digest(generated) if generated else None

    def of(self, n_prompt: int) -> list[EditedRun]:
        """Return the edited runs of a request, ascending; neighbours differ in their edits. At most one a token."""
        first, last = n_prompt // 2, max(1, n_prompt // 2)
        start, head = 0, []
        for reach, edits in self._first:
            head.append(EditedRun(start, min(reach, first), edits))
            start = head[-1].stop
            if start == first:
                break
        stop, tail = n_prompt, []
        for reach, edits in self._last:
            tail.append(EditedRun(n_prompt - min(reach, last), stop, edits))
            stop = tail[-1].start
            if stop == n_prompt - last:
                break
        runs = head
        if self._prompt is not None:
            runs.append(EditedRun(start, stop, self._prompt))
        runs += reversed(tail)
        if self._generated is not None:
            runs.append(EditedRun(n_prompt, ENDLESS, self._generated))
        return _joined(runs)

    def _nested(self, reaches: Sequence[int], prompt: int) -> list[tuple[int, bytes]]:
        """Return each distinct reach above 0, ascending, with the digest of the edits that reach as far."""
        members: defaultdict[int, int] = defaultdict(int)
        for number, reach in enumerate(reaches):
            members[reach] |= 1 << number
        nested, edits = [], prompt
        for reach in sorted(members.keys() - {0}, reverse=True):
            edits |= members[reach]
            nested.append((reach, self._digest(edits)))
        return nested[::-1]

    def _digest(self, edits: int) -> bytes:
        """Return the digest of a set of edits, whose numbers are the bits."""
        members = edits.to_bytes(self._set_bytes, "little")
        return hashlib.blake2b(self._identity + members, digest_size=DIGEST_BYTES).digest()


def _joined(runs: Sequence[EditedRun]) -> list[EditedRun]:
    joined: list[EditedRun] = []
    for run in runs:
        if run.start >= run.stop:
            continue
        if joined and joined[-1].stop == run.start and joined[-1].edits == run.edits:
            joined[-1] = joined[-1]._replace(stop=run.stop)
        else:
            joined.append(run)
    return joined
