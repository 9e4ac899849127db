"""From the chunks of a step to the index tensors that apply all its edits, layer by layer.

Within a chunk, token rows that the same members touch form a group; a group is a small dense product of its own,
so a layer costs one gather, one batched low-rank product and one write, whatever mixture of interventions runs:

    x = h[rows]                                   [groups, width, hidden]
    y = act(x A[columns]^T + b[columns]) * scale  [groups, width, rank]
    h[rows] = x + y U[columns]                    each row belongs to exactly one group: the write is deterministic

Groups are cut to at most `GROUP_ROWS` rows, and padded to the widest; padded columns point at the bank's zero row.
Where the CPU has its kernels, `edit_rows` (cpu_kernels/edits.cpp) does it row by row.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reftserve.interventions import Positions, activate
from reftserve.server.engine.bank import Bank, EditSpan
from reftserve.server.engine.scheduler import Chunk
from reftserve.server.engine.transfers import to_device

GROUP_ROWS = 16


@dataclass(frozen=True)
class LayerEdits:
    """Everything one layer needs: which packed rows, which columns of the bank, how strongly.

    rows: [groups, width] packed token rows, padded with 0. columns: [groups, rank] rows of the bank, padded with 0.
    scale: [groups, rank]. edited: [rows edited], what `rows` holds without its padding. valid: where in
    [groups * width] these are; None when nothing is padded. owners: [rows edited], each one's group.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    edited: Tensor
    valid: Tensor | None
    owners: Tensor
    is_linear: bool

    def apply_on_cpu(self, hidden: Tensor, bank: Bank) -> None:
        """`apply` by the CPU's kernel, for float32: a row's result depends on nothing that is edited beside it."""
        torch.ops.reftserve.edit_rows(
            hidden, self.edited, self.owners, self.columns, self.scale, bank.A, bank.b, bank.U, bank.act
        )

    def apply(self, hidden: Tensor, bank: Bank) -> None:
        """Edit hidden [tokens, hidden_size] in place; computed in the bank's float32, stored in hidden's dtype."""
        x = hidden[self.rows].to(bank.A.dtype)
        y = torch.baddbmm(bank.b[self.columns].unsqueeze(1), x, bank.A[self.columns].transpose(1, 2))
        if not self.is_linear:
            y = activate(y, bank.act[self.columns].unsqueeze(1))
        new = torch.baddbmm(x, y * self.scale.unsqueeze(1), bank.U[self.columns]).flatten(0, 1)
        hidden.index_copy_(0, self.edited, (new if self.valid is None else new[self.valid]).to(hidden.dtype))


@dataclass(frozen=True)
class _Part:
    """Packed rows that the same members touch, by their place in the list of the chunk's uses."""

    rows: NDArray[np.int64]
    members: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    """One part at several layers. rows: [rows]. columns, scales: [layers, rank]."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    scales: NDArray[np.float32]


@dataclass(frozen=True)
class _Touch:
    """A use in a step: which chunk's, whose first row is packed row `offset`."""

    chunk: Chunk
    offset: int
    use: EditSpan


def plan_edits(chunks: list[Chunk], bank: Bank, device: torch.device) -> dict[int, LayerEdits]:
    """The edits of a step by layer; empty when no row is edited, so that such a step is the base model's own.

    Layers that the same uses touch differ in nothing but columns and scales, and are planned as one: usually all.
    """
    touches = _touches(chunks)
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    for number, touch in enumerate(touches):
        for layer in touch.use.layers:
            by_layer[layer].append(number)
    alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer, numbers in by_layer.items():
        alike[tuple(numbers)].append(layer)
    plan: dict[int, LayerEdits] = {}
    for members, layers in alike.items():
        groups = _groups([touches[number] for number in members], layers)
        if groups:
            plan.update(zip(layers, _pack(groups, bank, device), strict=True))
    return plan


def _touches(chunks: list[Chunk]) -> list[_Touch]:
    touches: list[_Touch] = []
    offset = 0
    for chunk in chunks:
        if chunk.start < chunk.sequence.n_prompt or chunk.sequence.edits_generated:
            touches += [_Touch(chunk, offset, use) for use in chunk.sequence.edits]
        offset += chunk.stop - chunk.start
    return touches


def _groups(touches: list[_Touch], layers: list[int]) -> list[_Group]:
    """Groups of rows at layers that all these uses touch, chunk by chunk, members in the order of the composition."""
    groups = []
    for _, same_chunk in itertools.groupby(touches, key=lambda touch: touch.offset):
        members = list(same_chunk)
        places = [[touch.use.at[layer] for layer in layers] for touch in members]
        rows = [touch.use.rows[place] for touch, place in zip(members, places, strict=True)]
        scales = [touch.use.scales[place] for touch, place in zip(members, places, strict=True)]
        for part in _parts(members[0].chunk, members[0].offset, [touch.use.positions for touch in members]):
            columns = np.concatenate([rows[member] for member in part.members], axis=1)
            strengths = np.concatenate([scales[member] for member in part.members], axis=1)
            groups.append(_Group(part.rows, columns, strengths))
    return groups


def _parts(chunk: Chunk, offset: int, positions: list[Positions]) -> list[_Part]:
    """Rows of one chunk, grouped by the set of members that touch them."""
    touched = np.zeros((chunk.stop - chunk.start, len(positions)), dtype=bool)
    for member, touches in enumerate(positions):
        touched[touches.indices(chunk.sequence.n_prompt, chunk.start, chunk.stop) - chunk.start, member] = True
    edited = np.flatnonzero(touched.any(axis=1))
    if not len(edited):
        return []
    parts = []
    for pattern in np.unique(touched[edited], axis=0) if len(positions) > 1 else np.ones((1, 1), dtype=bool):
        rows = edited[(touched[edited] == pattern).all(axis=1)] + offset
        members = tuple(np.flatnonzero(pattern).tolist())
        parts += [_Part(rows[start : start + GROUP_ROWS], members) for start in range(0, len(rows), GROUP_ROWS)]
    return parts


def _pack(groups: list[_Group], bank: Bank, device: torch.device) -> list[LayerEdits]:
    """The tensors of layers whose groups are these; one copy to the device serves them all."""
    layers = len(groups[0].columns)
    width = max(len(group.rows) for group in groups)
    rank = max(group.columns.shape[1] for group in groups)
    rows = np.zeros((len(groups), width), dtype=np.int64)
    valid = np.zeros((len(groups), width), dtype=bool)
    columns = np.zeros((layers, len(groups), rank), dtype=np.int64)
    scale = np.zeros((layers, len(groups), rank), dtype=np.float32)
    for index, group in enumerate(groups):
        rows[index, : len(group.rows)] = group.rows
        valid[index, : len(group.rows)] = True
        columns[:, index, : group.columns.shape[1]] = group.columns
        scale[:, index, : group.scales.shape[1]] = group.scales
    packed_rows, edited = to_device(rows, device), to_device(rows[valid], device)
    owners = to_device(np.repeat(np.arange(len(groups)), valid.sum(axis=1)), device)
    kept = None if valid.all() else to_device(np.flatnonzero(valid), device)
    is_linear = [bool(each.all()) for each in bank.is_linear[columns]]
    by_layer = zip(
        to_device(columns, device).unbind(),
        to_device(scale, device).unbind(),
        is_linear,
        strict=True,
    )
    return [LayerEdits(packed_rows, c, s, edited, kept, owners, linear) for c, s, linear in by_layer]


@dataclass(frozen=True)
class DecodeEdits:
    """One layer's edits of decode rows. columns: [rows, rank] rows of the bank. scale: [rows, rank]."""

    columns: Tensor
    scale: Tensor
    is_linear: bool

    def apply(self, hidden: Tensor, bank: Bank) -> None:
        """Edit hidden [rows, hidden_size] in place; computed in the bank's float32, stored in hidden's dtype."""
        x = hidden.unsqueeze(1).to(bank.A.dtype)
        y = torch.baddbmm(bank.b[self.columns].unsqueeze(1), x, bank.A[self.columns].transpose(1, 2))
        if not self.is_linear:
            y = activate(y, bank.act[self.columns].unsqueeze(1))
        edited = torch.baddbmm(x, y * self.scale.unsqueeze(1), bank.U[self.columns])
        hidden.copy_(edited.squeeze(1))


@dataclass(frozen=True)
class DecodePlan:
    """Edits of all layers on the host. columns: [layers, rows, rank] int32, padded with 0. scale: the same, float32."""

    columns: NDArray[np.int32]
    scale: NDArray[np.float32]
    is_linear: bool

    @property
    def rank(self) -> int:
        """Columns of the row and layer that has most; 0 when nothing is edited."""
        rank: int = self.columns.shape[2]
        return rank


def plan_decode_edits(chunks: list[Chunk], bank: Bank, num_layers: int) -> DecodePlan:
    """What edits each of these decode tokens, in each layer."""
    # By layer and row: columns of the bank and their scales, in the order of the composition.
    placed: defaultdict[tuple[int, int], list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = defaultdict(list)
    for row, chunk in enumerate(chunks):
        sequence = chunk.sequence
        # The last prompt token can be a chunk of its own too.
        if sequence.edits and (chunk.start < sequence.n_prompt or sequence.edits_generated):
            for use in sequence.edits:
                if len(use.positions.indices(sequence.n_prompt, chunk.start, chunk.stop)):
                    for layer, rows, scales in zip(use.layers, use.rows, use.scales, strict=True):
                        placed[layer, row].append((rows, scales))
    rank = max((sum(len(rows) for rows, _ in parts) for parts in placed.values()), default=0)
    columns = np.zeros((num_layers, len(chunks), rank), dtype=np.int32)
    scale = np.zeros((num_layers, len(chunks), rank), dtype=np.float32)
    for (layer, row), parts in placed.items():
        rows = np.concatenate([rows for rows, _ in parts])
        columns[layer, row, : len(rows)] = rows
        scale[layer, row, : len(rows)] = np.concatenate([scales for _, scales in parts])
    return DecodePlan(columns, scale, is_linear=bool(bank.is_linear[columns].all()))
