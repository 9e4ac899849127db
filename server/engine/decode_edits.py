"""Edits of a step whose rows are all decode tokens: every row has columns of its own, as many as the one that has most.

    y = act(h A[columns]^T + b[columns]) * scale    [rows, 1, rank]
    h = h + y U[columns]                            columns that pad point at the bank's zero row

Nothing here has a shape that depends on which rows are edited, unlike in edit_plan.py: a recorded step needs that.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reftserve.interventions import activate
from reftserve.server.engine.bank import Bank
from reftserve.server.engine.scheduler import Chunk


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
