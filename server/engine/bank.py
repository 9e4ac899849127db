"""The bank: one device-resident pool of rank rows, shared by all layers and all hot interventions.

    A, U   [rows, hidden]     b [rows]     act [rows]
    row 0 is all zeros: columns padded to equal rank point at it and add exactly nothing
A *slot* is the set of rows that one hot intervention holds. Rows are gathered by index, so nothing fragments, and a
high rank costs other interventions nothing. Running sequences pin their slots. Idle slots stay hot until their rows are
needed; the least recently used goes first. The number of hot interventions does not change the work on a slot.
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
    """Edits with equal positions and ranks at distinct layers, at a sequence's scale. rows, scales: [layers, rank]."""

    layers: tuple[int, ...]
    positions: Positions
    rows: NDArray[np.int64]
    scales: NDArray[np.float32]

    @cached_property
    def index_of(self) -> dict[int, int]:
        """Return each layer's index in `rows` and `scales`."""
        return {layer: index for index, layer in enumerate(self.layers)}


@dataclass(eq=False)
class Slot:
    """The rows of one hot intervention, its spans at scale 1, and the number of running sequences that pin it."""

    rows: NDArray[np.int64]
    spans: tuple[EditSpan, ...]
    pins: int = 0


class Bank:
    """The pool and its slots. Writes happen between steps, only to rows that no running sequence reads."""

    def __init__(self, hidden_size: int, *, max_bytes: int, device: torch.device) -> None:
        bytes_per_row = 4 * (2 * hidden_size + 2)
        self.num_rows = max(2, max_bytes // bytes_per_row)
        self.hidden_size = hidden_size
        self.A = torch.zeros(self.num_rows, hidden_size, device=device)
        self.U = torch.zeros(self.num_rows, hidden_size, device=device)
        self.b = torch.zeros(self.num_rows, device=device)
        self.act = torch.zeros(self.num_rows, dtype=torch.int8, device=device)
        # On the host, so that planning a step does not read from the device.
        self.is_linear = np.ones(self.num_rows, dtype=bool)
        self._free = np.arange(1, self.num_rows, dtype=np.int64)  # a stack of `_num_free` rows
        self._num_free = self.num_rows - 1
        self._slots: dict[str, Slot] = {}
        self._idle: OrderedDict[str, Slot] = OrderedDict()
        self._idle_rows = 0
        self._uploads = Uploads(device)

    @property
    def rows_used(self) -> int:
        """Return the number of rows that hot interventions hold."""
        return self.num_rows - 1 - self._num_free

    def check(self, interventions: tuple[tuple[Intervention, float], ...]) -> None:
        """Raise RequestRefused when the bank can never hold these together."""
        distinct = {i.content_hash: i.columns for i, _ in interventions}
        for columns in distinct.values():
            if columns.hidden_size != self.hidden_size:
                raise RequestRefused(f"edits have hidden size {columns.hidden_size}; the base has {self.hidden_size}")
        needed = sum(columns.rank for columns in distinct.values())
        if needed > self.num_rows - 1:
            raise RequestRefused(f"interventions need {needed} rank rows; the bank has {self.num_rows - 1}")

    def acquire(self, interventions: tuple[tuple[Intervention, float], ...]) -> tuple[EditSpan, ...] | None:
        """Make interventions hot and pin them; return None and pin nothing when running sequences leave no room."""
        spans: list[EditSpan] = []
        pinned: list[str] = []
        for intervention, scale in interventions:
            try:
                slot = self._hot(intervention)
            except Exception:
                self._unpin(pinned)
                raise
            if slot is None:
                self._unpin(pinned)
                return None
            self._pin(intervention.content_hash, slot)
            pinned.append(intervention.content_hash)
            spans += slot.spans if scale == 1.0 else [_scaled(span, scale) for span in slot.spans]
        return tuple(spans)

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
            slot = Slot(rows, _spans(intervention, rows))
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
        # The copies overlap with steps. The rows are written in stream order, after the steps that read the old ones.
        index, *new = self._uploads.upload(torch.from_numpy(rows), columns.A, columns.U, columns.b, columns.act)
        for pool, numbers in zip((self.A, self.U, self.b, self.act), new, strict=True):
            pool.index_copy_(0, index, numbers.to(pool.dtype))
        self.is_linear[rows] = columns.act.numpy() == Activation.LINEAR


def _spans(intervention: Intervention, rows: NDArray[np.int64]) -> tuple[EditSpan, ...]:
    # A layer may repeat a site; its n-th occurrence joins the span of the n-th occurrences at other layers.
    members: defaultdict[tuple[Positions, int, int], list[tuple[int, int]]] = defaultdict(list)
    seen: defaultdict[EditSite, int] = defaultdict(int)
    start = 0
    for site in intervention.sites:
        members[site.positions, site.rank, seen[site]].append((site.layer, start))
        seen[site] += 1
        start += site.rank
    scales = intervention.columns.scale.numpy()
    spans = []
    for (positions, rank, _), edits in members.items():
        columns = np.array([start for _, start in edits])[:, None] + np.arange(rank)
        spans.append(EditSpan(tuple(layer for layer, _ in edits), positions, rows[columns], scales[columns]))
    return tuple(spans)


def _scaled(span: EditSpan, scale: float) -> EditSpan:
    return replace(span, scales=span.scales * np.float32(scale))
