"""Chooses torch or our kernel for attention and edits by timing the engine's own classes (`base/kernel_choice.py`)."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PretrainedConfig

from reftserve.server.base.attention import LayerShape
from reftserve.server.base.kernel_choice import ROWS, KernelChoice, Trial
from reftserve.server.base.replacement import random_rows
from reftserve.server.engine.bank import Bank
from reftserve.server.engine.edit_plan import GROUP_ROWS, LayerEdits
from reftserve.server.engine.kv_cache.cpu import CpuCache
from reftserve.server.engine.kv_cache.gathered import GatheredCache
from reftserve.server.engine.messages import SamplingParams
from reftserve.server.engine.scheduler import Batch, Chunk
from reftserve.server.engine.sequence import Sequence

CONTEXT = 96  # tokens of each sequence that attends
RANK = 4
CPU = torch.device("cpu")


def takes_paged_attention(kernels: KernelChoice, config: PretrainedConfig, shape: LayerShape, block_size: int) -> bool:
    """Return whether attention reads the cache in place by the kernel. shape: of a typical layer."""
    heads = config.num_attention_heads
    name = f"{heads}/{shape.kv_heads}x{shape.key_dim}+{shape.value_dim} by {block_size}"
    return kernels.takes("paged_attention", name, lambda: _attention_trials(heads, shape, block_size))


def takes_edit_rows(kernels: KernelChoice, hidden_size: int) -> bool:
    """Return whether the kernel applies the edits of a step."""
    return kernels.takes("edit_rows", f"{hidden_size}", lambda: _edit_trials(hidden_size))


def _attention_trials(heads: int, shape: LayerShape, block_size: int) -> list[Trial]:
    blocks = -(-CONTEXT // block_size)
    padded = -(-block_size // 16) * 16
    max_bytes = 4 * max(ROWS) * blocks * shape.kv_heads * padded * (shape.key_dim + shape.value_dim + 16)
    in_place = CpuCache([shape], block_size=block_size, max_bytes=max_bytes)
    gathered = GatheredCache([shape], block_size=block_size, max_bytes=max_bytes, dtype=torch.float32, device=CPU)
    decodes = [_chunk([*range(row * blocks, (row + 1) * blocks)], CONTEXT - 1) for row in range(max(ROWS))]
    prompt = _chunk(decodes[0].sequence.block_table, CONTEXT - max(ROWS))
    trials = []
    for batch in (*(Batch([], decodes[:rows], []) for rows in ROWS), Batch([prompt], [], [])):
        rows = sum(chunk.stop - chunk.start for chunk in batch.chunks)
        query = random_rows(shape.key_dim, heads * rows).view(heads, rows, -1)
        key = random_rows(shape.key_dim, shape.kv_heads * rows).view(shape.kv_heads, rows, -1)
        value = random_rows(shape.value_dim, shape.kv_heads * rows).view(shape.kv_heads, rows, -1)
        kernel, plain = (
            partial(cache.step(batch).attend, 0, query, key, value, None, None) for cache in (in_place, gathered)
        )
        trials.append(Trial(kernel, plain))
    return trials


def _chunk(blocks: list[int], start: int) -> Chunk:
    sequence = Sequence("trial", [0] * CONTEXT, CONTEXT, SamplingParams(max_tokens=1))
    sequence.block_table = blocks
    return Chunk(sequence, start, CONTEXT)


def _edit_trials(hidden_size: int) -> list[Trial]:
    groups = -(-max(ROWS) // GROUP_ROWS)
    bank = Bank(hidden_size, max_bytes=(1 + groups * RANK) * 4 * (2 * hidden_size + 2), device=CPU)
    bank.A.copy_(random_rows(hidden_size, bank.num_rows)[0] / hidden_size)
    bank.U.copy_(bank.A)
    trials = []
    for count in ROWS:
        width = min(count, GROUP_ROWS)
        edited = torch.arange(count)
        rows = edited.view(-1, width)
        edits = LayerEdits(
            rows=rows,
            columns=1 + torch.arange(len(rows) * RANK).view(-1, RANK),
            scale=torch.ones(len(rows), RANK),
            edited=edited,
            valid=None,
            owners=edited // width,
            is_linear=True,
        )
        hidden = random_rows(hidden_size, count)[0]
        trials.append(Trial(partial(edits.apply_on_cpu, hidden, bank), partial(edits.apply, hidden, bank)))
    return trials
