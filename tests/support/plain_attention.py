"""The reference for every attention over the cache: plain attention of one sequence, and chunks of test sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from reftserve.server.engine.messages import SamplingParams
from reftserve.server.engine.scheduler import Batch, Chunk
from reftserve.server.engine.sequence import Sequence


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None) -> Tensor:
    """Return attention over all keys, in float64: [heads, tokens, dim] -> [tokens, heads, value_dim]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (t.double().repeat_interleave(group, 0) for t in (keys, values))
    at = torch.arange(start, start + query.shape[1]).unsqueeze(1)
    key_at = torch.arange(keys.shape[1])
    visible = (key_at <= at) & (key_at > at - (window or 10**6))
    scores = (query.double() @ keys.transpose(1, 2) * query.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)


def chunk(blocks: list[int], start: int, stop: int) -> Chunk:
    sequence = Sequence("any", [0] * stop, stop, SamplingParams(max_tokens=1))
    sequence.block_table = blocks
    return Chunk(sequence, start, stop)


def batch_of(chunks: list[Chunk]) -> Batch:
    """Make a batch with decode tokens last, as the scheduler packs them."""
    return Batch([c for c in chunks if not c.is_decode], [c for c in chunks if c.is_decode], stale_blocks=[])
