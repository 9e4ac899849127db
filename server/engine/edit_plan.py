"""From the chunks of a step to the index tensors that apply all its edits, layer by layer.

Within a chunk, token rows that the same members touch form a group; a group is a small dense product of its own,
so a layer costs one gather, one batched low-rank product and one write, whatever mixture of interventions runs:

    x = h[rows]                                   [groups, width, hidden]
    y = act(x A[columns]^T + b[columns]) * scale  [groups, width, rank]
    h[rows] = x + y U[columns]                    each row belongs to exactly one group: the write is deterministic

Groups are cut to at most `GROUP_ROWS` rows, and padded to the widest; padded columns point at the bank's zero row.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reftserve.interventions import Positions, activate
from reftserve.server.engine.bank import Bank, EditUse
from reftserve.server.engine.scheduler import Chunk
from reftserve.server.engine.transfers import to_device

GROUP_ROWS = 16


@dataclass(frozen=True)
class LayerEdits:
    """Everything one layer needs: which packed rows, which columns of the bank, how strongly.

    rows: [groups, width] packed token rows, padded with 0. columns: [groups, rank] rows of the bank, padded with 0.
    scale: [groups, rank]. valid: [rows edited] flat indices into [groups * width] that are not padding.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    valid: Tensor
    is_linear: bool

    def apply(self, hidden: Tensor, bank: Bank) -> None:
        """Edit hidden [tokens, hidden_size] in place; computed in the bank's float32, stored in hidden's dtype."""
        x = hidden[self.rows].to(bank.A.dtype)
        y = torch.baddbmm(bank.b[self.columns].unsqueeze(1), x, bank.A[self.columns].transpose(1, 2))
        if not self.is_linear:
            y = activate(y, bank.act[self.columns].unsqueeze(1))
        edited = torch.baddbmm(x, y * self.scale.unsqueeze(1), bank.U[self.columns])
        valid_rows = self.rows.flatten()[self.valid]
        hidden[valid_rows] = edited.flatten(0, 1)[self.valid].to(hidden.dtype)


@dataclass(frozen=True)
class _Part:
    """Packed rows that the same members touch, by their place in the layer's list of uses."""

    rows: NDArray[np.int64]
    members: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    scales: NDArray[np.float32]


def plan_edits(chunks: list[Chunk], bank: Bank, device: torch.device) -> dict[int, LayerEdits]:
    """The edits of a step by layer; empty when no row is edited, so that such a step is the base model's own."""
    groups: defaultdict[int, list[_Group]] = defaultdict(list)
    offset = 0
    for chunk in chunks:
        if chunk.start < chunk.sequence.n_prompt or chunk.sequence.edits_generated:
            # Most interventions edit the same positions in all their layers: these are worked out once.
            parts: dict[tuple[Positions, ...], list[_Part]] = {}
            for layer, uses in _by_layer(chunk.sequence.edits).items():
                positions = tuple(use.positions for use in uses)
                if positions not in parts:
                    parts[positions] = _parts(chunk, offset, positions)
                groups[layer] += [_group(part, uses) for part in parts[positions]]
        offset += chunk.stop - chunk.start
    return {layer: _pack(members, bank, device) for layer, members in groups.items() if members}


def _by_layer(edits: tuple[EditUse, ...]) -> dict[int, list[EditUse]]:
    layers: defaultdict[int, list[EditUse]] = defaultdict(list)
    for use in edits:
        layers[use.layer].append(use)
    return layers


def _parts(chunk: Chunk, offset: int, positions: tuple[Positions, ...]) -> list[_Part]:
    """Rows of one chunk, grouped by the set of members that touch them, each with its positions."""
    touched = np.zeros((chunk.stop - chunk.start, len(positions)), dtype=bool)
    for member, touches in enumerate(positions):
        touched[touches.indices(chunk.sequence.n_prompt, chunk.start, chunk.stop) - chunk.start, member] = True
    edited = np.flatnonzero(touched.any(axis=1))
    if not len(edited):
        return []
    parts = []
    for pattern in np.unique(touched[edited], axis=0):
        rows = edited[(touched[edited] == pattern).all(axis=1)] + offset
        members = tuple(np.flatnonzero(pattern).tolist())
        parts += [_Part(rows[start : start + GROUP_ROWS], members) for start in range(0, len(rows), GROUP_ROWS)]
    return parts


def _group(part: _Part, uses: list[EditUse]) -> _Group:
    if len(part.members) == 1:
        use = uses[part.members[0]]
        return _Group(part.rows, use.rows, use.scales)
    chosen = [uses[member] for member in part.members]
    columns = np.concatenate([use.rows for use in chosen])
    return _Group(part.rows, columns, np.concatenate([use.scales for use in chosen]))


def _pack(groups: list[_Group], bank: Bank, device: torch.device) -> LayerEdits:
    width = max(len(group.rows) for group in groups)
    rank = max(len(group.columns) for group in groups)
    rows = np.zeros((len(groups), width), dtype=np.int64)
    columns = np.zeros((len(groups), rank), dtype=np.int64)
    scale = np.zeros((len(groups), rank), dtype=np.float32)
    valid = np.zeros((len(groups), width), dtype=bool)
    for index, group in enumerate(groups):
        rows[index, : len(group.rows)] = group.rows
        valid[index, : len(group.rows)] = True
        columns[index, : len(group.columns)] = group.columns
        scale[index, : len(group.scales)] = group.scales
    return LayerEdits(
        rows=to_device(rows, device),
        columns=to_device(columns, device),
        scale=to_device(scale, device),
        valid=to_device(np.flatnonzero(valid), device),
        is_linear=bool(bank.is_linear[columns].all()),
    )
