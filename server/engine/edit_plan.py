"""Turns the chunks of a step into the index tensors that apply all its edits, layer by layer.

Rows of a chunk with the same edits form groups of at most `GROUP_ROWS`, padded to the widest. A layer costs one gather,
one batched low-rank product and one write, whatever mixture of interventions runs:
    x = h[rows]                                   [groups, width, hidden]
    y = act(x A[columns]^T + b[columns]) * scale  [groups, width, rank]
    h[rows] = x + y U[columns]                    each row belongs to exactly one group: the write is deterministic
With the CPU kernels, `edit_rows` (cpu_kernels/edits.cpp) computes the same row by row.

A decode token whose interventions edit only prompt tokens is no edited row. Without edited rows the plan is empty, and
the step is the base model's own. Only a decode step that is recorded on CUDA differs: there one edited row sends all
rows through the product, padded with the bank's zero row.
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
    """One layer's edits. rows: [groups, width] packed token rows, padded with 0. scale: [groups, rank].

    columns: [groups, rank] rows of the bank, padded with its zero row 0. edited: [edited rows], `rows` without padding.
    valid: their indices in [groups * width]; None without padding. owners: [edited rows], the group of each.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    edited: Tensor
    valid: Tensor | None
    owners: Tensor
    is_linear: bool

    def apply_on_cpu(self, hidden: Tensor, bank: Bank) -> None:
        """Do as `apply` with the CPU's float32 kernel; a row's result is independent of the other rows."""
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
    """Packed rows with the same edits. spans: indices into the chunk's list of spans."""

    rows: NDArray[np.int64]
    spans: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    """One part at several layers. rows: [rows]. columns, scales: [layers, rank]."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    scales: NDArray[np.float32]


@dataclass(frozen=True)
class _ChunkSpan:
    """A span that may edit a chunk. offset: packed row of the chunk's first token."""

    chunk: Chunk
    offset: int
    span: EditSpan


def plan_edits(chunks: list[Chunk], bank: Bank, device: torch.device) -> dict[int, LayerEdits]:
    """Return a step's edits by layer, none when no row is edited. Layers with the same spans are planned together."""
    candidates = _chunk_spans(chunks)
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    for number, candidate in enumerate(candidates):
        for layer in candidate.span.layers:
            by_layer[layer].append(number)
    layers_of: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer, numbers in by_layer.items():
        layers_of[tuple(numbers)].append(layer)
    plan: dict[int, LayerEdits] = {}
    for members, layers in layers_of.items():
        groups = _groups([candidates[number] for number in members], layers)
        if groups:
            plan.update(zip(layers, _pack(groups, bank, device), strict=True))
    return plan


def _chunk_spans(chunks: list[Chunk]) -> list[_ChunkSpan]:
    found: list[_ChunkSpan] = []
    offset = 0
    for chunk in chunks:
        if chunk.start < chunk.sequence.n_prompt or chunk.sequence.edits_generated:
            found += [_ChunkSpan(chunk, offset, span) for span in chunk.sequence.edits]
        offset += chunk.stop - chunk.start
    return found


def _groups(candidates: list[_ChunkSpan], layers: list[int]) -> list[_Group]:
    """Return the groups of rows at layers that all these spans edit, chunk by chunk, in composition order."""
    groups = []
    for _, same_chunk in itertools.groupby(candidates, key=lambda candidate: candidate.offset):
        members = list(same_chunk)
        spans = [member.span for member in members]
        indices = [[span.index_of[layer] for layer in layers] for span in spans]
        rows = [span.rows[index] for span, index in zip(spans, indices, strict=True)]
        scales = [span.scales[index] for span, index in zip(spans, indices, strict=True)]
        for part in _parts(members[0].chunk, members[0].offset, [span.positions for span in spans]):
            columns = np.concatenate([rows[span] for span in part.spans], axis=1)
            strengths = np.concatenate([scales[span] for span in part.spans], axis=1)
            groups.append(_Group(part.rows, columns, strengths))
    return groups


def _parts(chunk: Chunk, offset: int, positions: list[Positions]) -> list[_Part]:
    is_edited = np.zeros((chunk.stop - chunk.start, len(positions)), dtype=bool)
    for span, at in enumerate(positions):
        is_edited[at.indices(chunk.sequence.n_prompt, chunk.start, chunk.stop) - chunk.start, span] = True
    edited = np.flatnonzero(is_edited.any(axis=1))
    if not len(edited):
        return []
    parts = []
    for pattern in np.unique(is_edited[edited], axis=0) if len(positions) > 1 else np.ones((1, 1), dtype=bool):
        rows = edited[(is_edited[edited] == pattern).all(axis=1)] + offset
        spans = tuple(np.flatnonzero(pattern).tolist())
        parts += [_Part(rows[start : start + GROUP_ROWS], spans) for start in range(0, len(rows), GROUP_ROWS)]
    return parts


def _pack(groups: list[_Group], bank: Bank, device: torch.device) -> list[LayerEdits]:
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
        """Return the largest number of columns of any row and layer; 0 when nothing is edited."""
        rank: int = self.columns.shape[2]
        return rank


def plan_decode_edits(chunks: list[Chunk], bank: Bank, num_layers: int) -> DecodePlan:
    """Return the edits of decode tokens, one row for each chunk, in all layers."""
    placed: defaultdict[tuple[int, int], list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = defaultdict(list)
    for row, chunk in enumerate(chunks):
        sequence = chunk.sequence
        # A chunk can also be the last prompt token alone.
        if sequence.edits and (chunk.start < sequence.n_prompt or sequence.edits_generated):
            for span in sequence.edits:
                if len(span.positions.indices(sequence.n_prompt, chunk.start, chunk.stop)):
                    for layer, rows, scales in zip(span.layers, span.rows, span.scales, strict=True):
                        placed[layer, row].append((rows, scales))
    rank = max((sum(len(rows) for rows, _ in parts) for parts in placed.values()), default=0)
    columns = np.zeros((num_layers, len(chunks), rank), dtype=np.int32)
    scale = np.zeros((num_layers, len(chunks), rank), dtype=np.float32)
    for (layer, row), parts in placed.items():
        rows = np.concatenate([rows for rows, _ in parts])
        columns[layer, row, : len(rows)] = rows
        scale[layer, row, : len(rows)] = np.concatenate([scales for _, scales in parts])
    return DecodePlan(columns, scale, is_linear=bool(bank.is_linear[columns].all()))
