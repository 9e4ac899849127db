"""The bank: one device-resident pool of rank rows, shared by all layers and all hot interventions.

    A, U   [rows, hidden]     b [rows]     act [rows]
    row 0 is all zeros: where columns are padded to equal rank they point at it and add exactly nothing

A *slot* is the set of rows that one hot intervention holds. Rows are gathered by index, so a slot need not be
contiguous: nothing fragments, and an intervention of high rank costs no other anything. Slots are pinned by the
sequences that run on them; unpinned ones stay hot until their rows are needed (least recently used goes first).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from reftserve.interventions import Activation, Intervention, Positions
from reftserve.server.engine.errors import RequestRefused
from reftserve.server.engine.transfers import Uploads


@dataclass(frozen=True, eq=False)
class EditUse:
    """One edit as one sequence uses it: where, which rows of the bank, how strongly."""

    layer: int
    positions: Positions
    rows: NDArray[np.int64]
    scales: NDArray[np.float32]


@dataclass(eq=False)
class Slot:
    """The rows of one hot intervention and how many running sequences need them."""

    rows: NDArray[np.int64]
    pins: int = 0


class Bank:
    """Rows in, rows out; writes happen between steps, only ever to rows that nobody reads."""

    def __init__(self, hidden_size: int, *, max_bytes: int, device: torch.device) -> None:
        bytes_per_row = 4 * (2 * hidden_size + 2)
        self.num_rows = max(2, max_bytes // bytes_per_row)
        self.hidden_size = hidden_size
        self.A = torch.zeros(self.num_rows, hidden_size, device=device)
        self.U = torch.zeros(self.num_rows, hidden_size, device=device)
        self.b = torch.zeros(self.num_rows, device=device)
        self.act = torch.zeros(self.num_rows, dtype=torch.int8, device=device)
        # On the host too, so that planning a step needs no look at the device.
        self.is_linear = np.ones(self.num_rows, dtype=bool)
        self._free = list(range(self.num_rows - 1, 0, -1))
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._uploads = Uploads(device)

    @property
    def rows_used(self) -> int:
        """Rows that hot interventions hold, running or not."""
        return self.num_rows - 1 - len(self._free)

    def check(self, interventions: tuple[tuple[Intervention, float], ...]) -> None:
        """Raise RequestRefused when these can never be hot together."""
        distinct = {i.content_hash: i for i, _ in interventions}
        for intervention in distinct.values():
            sizes = {placed.edit.hidden_size for placed in intervention.edits}
            if sizes != {self.hidden_size}:
                raise RequestRefused(f"edits have hidden size {sorted(sizes)}; the base has {self.hidden_size}")
        needed = sum(_rank(intervention) for intervention in distinct.values())
        if needed > self.num_rows - 1:
            raise RequestRefused(f"interventions need {needed} rank rows; the bank has {self.num_rows - 1}")

    def acquire(self, interventions: tuple[tuple[Intervention, float], ...]) -> tuple[EditUse, ...] | None:
        """Make these hot and pin them; None, and nothing pinned, when running sequences leave no room."""
        uses: list[EditUse] = []
        pinned: list[str] = []
        for intervention, scale in interventions:
            slot = self._hot(intervention)
            if slot is None:
                self._unpin(pinned)
                return None
            slot.pins += 1
            pinned.append(intervention.content_hash)
            uses += _uses(intervention, slot, scale)
        return tuple(uses)

    def release(self, interventions: tuple[tuple[Intervention, float], ...]) -> None:
        """Undo one `acquire`; the slots stay hot."""
        self._unpin([intervention.content_hash for intervention, _ in interventions])

    def _unpin(self, hashes: list[str]) -> None:
        for content_hash in hashes:
            self._slots[content_hash].pins -= 1

    def _hot(self, intervention: Intervention) -> Slot | None:
        slot = self._slots.get(intervention.content_hash)
        if slot is None:
            rank = _rank(intervention)
            if not self._make_room(rank):
                return None
            slot = Slot(np.array([self._free.pop() for _ in range(rank)], dtype=np.int64))
            self._write(slot.rows, intervention)
            self._slots[intervention.content_hash] = slot
        self._slots.move_to_end(intervention.content_hash)
        return slot

    def _make_room(self, rank: int) -> bool:
        unpinned = [(key, slot) for key, slot in self._slots.items() if slot.pins == 0]
        if len(self._free) + sum(len(slot.rows) for _, slot in unpinned) < rank:
            return False
        for key, slot in unpinned:
            if len(self._free) >= rank:
                break
            self._free.extend(slot.rows.tolist())
            del self._slots[key]
        return True

    def _write(self, rows: NDArray[np.int64], intervention: Intervention) -> None:
        edits = [placed.edit for placed in intervention.edits]
        A, U, b, act = (torch.cat([getattr(edit, name) for edit in edits]) for name in ("A", "U", "b", "act"))
        # The copies run beside the steps; the rows are written in the steps' own order, after those that read the old.
        index, *columns = self._uploads.upload(torch.from_numpy(rows), A, U, b, act)
        for pool, new in zip((self.A, self.U, self.b, self.act), columns, strict=True):
            pool.index_copy_(0, index, new.to(pool.dtype))
        self.is_linear[rows] = (act == Activation.LINEAR).numpy()


def _rank(intervention: Intervention) -> int:
    return sum(placed.edit.rank for placed in intervention.edits)


def _uses(intervention: Intervention, slot: Slot, scale: float) -> list[EditUse]:
    uses = []
    start = 0
    for placed in intervention.edits:
        stop = start + placed.edit.rank
        scales = (placed.edit.scale * scale).numpy().astype(np.float32)
        uses.append(EditUse(placed.layer, placed.positions, slot.rows[start:stop], scales))
        start = stop
    return uses
