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

from reftserve.interventions import activate
from reftserve.server.engine.bank import Bank, EditUse
from reftserve.server.engine.scheduler import Chunk

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
            for layer, uses in _by_layer(chunk.sequence.edits).items():
                groups[layer] += _chunk_groups(chunk, offset, uses)
        offset += chunk.stop - chunk.start
    return {layer: _pack(members, bank, device) for layer, members in groups.items() if members}


def _by_layer(edits: tuple[EditUse, ...]) -> dict[int, list[EditUse]]:
    layers: defaultdict[int, list[EditUse]] = defaultdict(list)
    for use in edits:
        layers[use.layer].append(use)
    return layers


def _chunk_groups(chunk: Chunk, offset: int, uses: list[EditUse]) -> list[_Group]:
    """Rows of one chunk at one layer, grouped by the set of members that touch them."""
    touched = np.zeros((chunk.stop - chunk.start, len(uses)), dtype=bool)
    for member, use in enumerate(uses):
        positions = use.positions.indices(chunk.sequence.n_prompt, chunk.start, chunk.stop)
        touched[np.asarray(positions, dtype=np.int64) - chunk.start, member] = True
    groups = []
    edited = np.flatnonzero(touched.any(axis=1))
    if not len(edited):
        return []
    for members in np.unique(touched[edited], axis=0):
        rows = edited[(touched[edited] == members).all(axis=1)] + offset
        chosen = [use for use, member in zip(uses, members, strict=True) if member]
        columns = np.concatenate([use.rows for use in chosen])
        scales = np.concatenate([use.scales for use in chosen])
        groups += [
            _Group(rows[start : start + GROUP_ROWS], columns, scales) for start in range(0, len(rows), GROUP_ROWS)
        ]
    return groups


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
        rows=torch.from_numpy(rows).to(device),
        columns=torch.from_numpy(columns).to(device),
        scale=torch.from_numpy(scale).to(device),
        valid=torch.from_numpy(np.flatnonzero(valid)).to(device),
        is_linear=bool(bank.is_linear[columns].all()),
    )
