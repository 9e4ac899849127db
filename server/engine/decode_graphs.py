"""Decode steps recorded once and replayed: one launch instead of the model's hundreds.

A recording reads and writes the same memory each time. So the inputs of a step are written to buffers before a replay,
for a number of rows that is rounded up:
    rows     [4, size]             token ids, positions, slots, lengths
    tables   [size, blocks]        blocks of each row's sequence
    columns  [layers, size, rank]  the bank's rows that edit each row
    scale    [layers, size, rank]  their scales; only recordings with edits read columns and scale
Padding rows write to the cache's scratch slot and attend to nothing, and their logits are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from reftserve.server.base.attention import AttentionStep
from reftserve.server.engine.bank import Bank
from reftserve.server.engine.edit_plan import DecodeEdits, DecodePlan, plan_decode_edits
from reftserve.server.engine.kv_cache.cuda import CudaCache, CudaStep, DecodeRows
from reftserve.server.engine.scheduler import Chunk
from reftserve.server.engine.transfers import copy_from_host, to_device

MAX_RANK = 16  # columns of a row in a layer; a step with more is not recorded
SIZE_STEP = 8
WARM_UP_RUNS = 2

Compute = Callable[[], Tensor]
# From token ids [rows], positions [rows] and edits by layer to logits [rows, vocabulary].
Forward = Callable[[Tensor, Tensor, AttentionStep, dict[int, DecodeEdits]], Tensor]


class Kind(Enum):
    """The edits that a recording computes; steps of the base model alone have none."""

    NO_EDITS = auto()
    LINEAR_EDITS = auto()
    ANY_EDITS = auto()


class DecodeGraphs:
    """Recordings by size and kind. max_rows: most sequences of a step. record: `record_cuda_graph`, or a test's."""

    def __init__(
        self,
        forward: Forward,
        cache: CudaCache,
        bank: Bank,
        *,
        num_layers: int,
        max_rows: int,
        max_context: int,
        record: Callable[[Compute], Compute],
    ) -> None:
        self._forward, self._cache, self._bank, self._record = forward, cache, bank, record
        self._num_layers = num_layers
        self._recordings: dict[tuple[int, Kind], Compute] = {}
        sizes = sorted({1, 2, 4, *range(SIZE_STEP, max_rows + SIZE_STEP, SIZE_STEP)})
        self.sizes = [size for size in sizes if size < max_rows] + [min(s for s in sizes if s >= max_rows)]
        largest, device = self.sizes[-1], cache.device
        blocks = min(cache.num_blocks, -(-max_context // cache.block_size))
        # Flat, so that the filled part is dense for every size.
        self._rows = torch.zeros(4 * largest, dtype=torch.int64, device=device)
        self._tables = torch.zeros(largest, blocks, dtype=torch.int32, device=device)
        self._columns = torch.zeros(num_layers * largest * MAX_RANK, dtype=torch.int32, device=device)
        self._scale = torch.zeros(num_layers * largest * MAX_RANK, device=device)

    def record_all(self) -> None:
        """Record every size without edits, so that no request waits for it. Others are recorded at first use."""
        for size in reversed(self.sizes):  # the largest first: smaller ones reuse its memory
            self._fill_rows([], size, None)
            self._recording(size, Kind.NO_EDITS)

    def run(self, chunks: list[Chunk], token_ids: Tensor | None = None) -> Tensor | None:
        """Return logits [chunks, vocabulary] until the next call; None if no recording fits. token_ids: [chunks]."""
        if len(chunks) > self.sizes[-1] or not all(chunk.samples and not chunk.scores for chunk in chunks):
            return None
        if max(len(chunk.sequence.block_table) for chunk in chunks) > self._tables.shape[1]:
            return None
        plan = plan_decode_edits(chunks, self._bank, self._num_layers)
        if plan.rank > MAX_RANK:
            return None
        kind = Kind.NO_EDITS if plan.rank == 0 else Kind.LINEAR_EDITS if plan.is_linear else Kind.ANY_EDITS
        size = next(size for size in self.sizes if size >= len(chunks))
        self._fill_rows(chunks, size, token_ids)
        if kind is not Kind.NO_EDITS:
            self._fill_edits(plan, size)
        return self._recording(size, kind)()[: len(chunks)]

    def _recording(self, size: int, kind: Kind) -> Compute:
        if (size, kind) not in self._recordings:
            self._recordings[size, kind] = self._record(lambda: self._compute(size, kind))
        return self._recordings[size, kind]

    def _compute(self, size: int, kind: Kind) -> Tensor:
        """Compute a recorded step. It must not read host memory or depend on a number on the device."""
        token_ids, positions, slots, lengths = self._rows[: 4 * size].view(4, size)
        edits = {}
        if kind is not Kind.NO_EDITS:
            shape = (self._num_layers, size, MAX_RANK)
            columns, scale = (flat[: np.prod(shape)].view(shape) for flat in (self._columns, self._scale))
            edits = {
                layer: DecodeEdits(columns[layer], scale[layer], is_linear=kind is Kind.LINEAR_EDITS)
                for layer in range(self._num_layers)
            }
        step = CudaStep(self._cache, slots, None, DecodeRows(self._tables[:size], lengths))
        return self._forward(token_ids, positions, step, edits)

    def _fill_rows(self, chunks: list[Chunk], size: int, token_ids: Tensor | None) -> None:
        rows = np.zeros((4, size), dtype=np.int64)
        rows[2] = self._cache.scratch_slot
        if chunks:
            known = token_ids is None
            tables, lengths = self._cache.tables(chunks)
            count, width = tables.shape
            rows[0, :count] = [chunk.sequence.token_ids[chunk.start] for chunk in chunks] if known else 0
            rows[1, :count] = lengths - 1
            rows[2, :count] = np.concatenate([self._cache.slots(chunk) for chunk in chunks])
            rows[3, :count] = lengths
            self._tables[:count, :width] = to_device(tables, self._cache.device)
        copy_from_host(self._rows[: 4 * size], rows.ravel())
        if token_ids is not None:
            self._rows[: len(chunks)] = token_ids

    def _fill_edits(self, plan: DecodePlan, size: int) -> None:
        for flat, values in ((self._columns, plan.columns), (self._scale, plan.scale)):
            padded = np.zeros((self._num_layers, size, MAX_RANK), dtype=values.dtype)
            padded[:, : values.shape[1], : plan.rank] = values
            copy_from_host(flat[: padded.size], padded.ravel())


def record_cuda_graph(device: torch.device) -> Callable[[Compute], Compute]:
    """Return a recorder of computations. Replays share one memory pool: an output is valid until the next replay."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Compute) -> Compute:
        # Warm up first: compiling kernels and allocating workspaces must not be recorded.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads' work on the device must not abort the recording.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return record
