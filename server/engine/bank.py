"""The bank: one device-resident pool of rank rows, shared by all layers and all hot interventions.

    A, U   [rows, hidden]     b [rows]     act [rows]
    row 0 is all zeros: where columns are padded to equal rank they point at it and add exactly nothing

A *slot* is the set of rows that one hot intervention holds. Rows are gathered by index, so a slot need not be
contiguous: nothing fragments, and an intervention of high rank costs no other anything. Slots are pinned by the
sequences that run on them; idle ones stay hot until their rows are needed (least recently used goes first). What is
done for a slot costs the same with ten hot interventions as with ten thousand.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from reftserve.interventions import Activation, EditSite, Intervention, Positions
from reftserve.server.engine.engine_errors import RequestRefused
from reftserve.server.engine.transfers import Uploads


@dataclass(frozen=True, eq=False)
class EditSpan:
    """Edits of one intervention, alike but for their layers, as one sequence uses them: most interventions are one.

    layers: each once. rows: [layers, rank] rows of the bank. scales: [layers, rank].
    """

    layers: tuple[int, ...]
    positions: Positions
    rows: NDArray[np.int64]
    scales: NDArray[np.float32]

    @cached_property
    def at(self) -> dict[int, int]:
        """Where each layer stands in `rows` and `scales`."""
        return {layer: index for index, layer in enumerate(self.layers)}


@dataclass(eq=False)
class Slot:
    """The rows of one hot intervention, its uses at scale 1, and how many running sequences need them."""

    rows: NDArray[np.int64]
    uses: tuple[EditSpan, ...]
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
        self._free = np.arange(1, self.num_rows, dtype=np.int64)  # a stack: the first `_num_free` of it
        self._num_free = self.num_rows - 1
        self._slots: dict[str, Slot] = {}
        self._idle: OrderedDict[str, Slot] = OrderedDict()  # those of `_slots` without pins, least recently used first
        self._idle_rows = 0
        self._uploads = Uploads(device)

    @property
    def rows_used(self) -> int:
        """Rows that hot interventions hold, running or not."""
        return self.num_rows - 1 - self._num_free

    def check(self, interventions: tuple[tuple[Intervention, float], ...]) -> None:
        """Raise RequestRefused when these can never be hot together."""
        distinct = {i.content_hash: i.columns for i, _ in interventions}
        for columns in distinct.values():
            if columns.hidden_size != self.hidden_size:
                raise RequestRefused(f"edits have hidden size {columns.hidden_size}; the base has {self.hidden_size}")
        needed = sum(columns.rank for columns in distinct.values())
        if needed > self.num_rows - 1:
            raise RequestRefused(f"interventions need {needed} rank rows; the bank has {self.num_rows - 1}")

    def acquire(self, interventions: tuple[tuple[Intervention, float], ...]) -> tuple[EditSpan, ...] | None:
        """Make these hot and pin them; None, and nothing pinned, when running sequences leave no room."""
        uses: list[EditSpan] = []
        pinned: list[str] = []
        for intervention, scale in interventions:
            slot = self._hot(intervention)
            if slot is None:
                self._unpin(pinned)
                return None
            self._pin(intervention.content_hash, slot)
            pinned.append(intervention.content_hash)
            uses += slot.uses if scale == 1.0 else [_scaled(use, scale) for use in slot.uses]
        return tuple(uses)

    def release(self, interventions: tuple[tuple[Intervention, float], ...]) -> None:
        """Undo one `acquire`; the slots stay hot."""
        self._unpin([intervention.content_hash for intervention, _ in interventions])

    def _pin(self, content_hash: str, slot: Slot) -> None:
        if self._idle.pop(content_hash, None) is not None:
            self._idle_rows -= len(slot.rows)
        slot.pins += 1

    def _unpin(self, hashes: list[str]) -> None:
        for content_hash in hashes:
            slot = self._slots[content_hash]
            slot.pins -= 1
            if slot.pins == 0:
                self._idle[content_hash] = slot
                self._idle_rows += len(slot.rows)

    def _hot(self, intervention: Intervention) -> Slot | None:
        slot = self._slots.get(intervention.content_hash)
        if slot is None:
            rank = intervention.columns.rank
            if not self._make_room(rank):
                return None
            self._num_free -= rank
            rows = self._free[self._num_free : self._num_free + rank].copy()
            self._write(rows, intervention)
            slot = Slot(rows, _uses(intervention, rows))
            self._slots[intervention.content_hash] = slot
        return slot

    def _make_room(self, rank: int) -> bool:
        if self._num_free + self._idle_rows < rank:
            return False
        while self._num_free < rank:
            content_hash, slot = self._idle.popitem(last=False)
            del self._slots[content_hash]
            self._idle_rows -= len(slot.rows)
            self._free[self._num_free : self._num_free + len(slot.rows)] = slot.rows
            self._num_free += len(slot.rows)
        return True

    def _write(self, rows: NDArray[np.int64], intervention: Intervention) -> None:
        columns = intervention.columns
        # The copies run beside the steps; the rows are written in the steps' own order, after those that read the old.
        index, *new = self._uploads.upload(torch.from_numpy(rows), columns.A, columns.U, columns.b, columns.act)
        for pool, numbers in zip((self.A, self.U, self.b, self.act), new, strict=True):
            pool.index_copy_(0, index, numbers.to(pool.dtype))
        self.is_linear[rows] = columns.act.numpy() == Activation.LINEAR


def _uses(intervention: Intervention, rows: NDArray[np.int64]) -> tuple[EditSpan, ...]:
    # Of equal edits at one layer, the n-th goes with the n-th of other layers.
    alike: defaultdict[tuple[Positions, int, int], list[tuple[int, int]]] = defaultdict(list)
    seen: defaultdict[EditSite, int] = defaultdict(int)
    start = 0
    for site in intervention.sites:
        alike[site.positions, site.rank, seen[site]].append((site.layer, start))
        seen[site] += 1
        start += site.rank
    scales = intervention.columns.scale.numpy()
    uses = []
    for (positions, rank, _), places in alike.items():
        columns = np.array([start for _, start in places])[:, None] + np.arange(rank)
        uses.append(EditSpan(tuple(layer for layer, _ in places), positions, rows[columns], scales[columns]))
    return tuple(uses)


def _scaled(use: EditSpan, scale: float) -> EditSpan:
    return replace(use, scales=use.scales * np.float32(scale))
