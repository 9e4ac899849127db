"""Attention over the paged cache: the contract in interface.py, and one file for each way to meet it.

gathered.py  any device and dtype: blocks are gathered, then torch's attention runs over them
native.py    float32 on the CPU: a kernel that reads the cache where it lies
"""

from __future__ import annotations

import torch

from reftserve.server.engine.attention.gathered import GatheredCache
from reftserve.server.engine.attention.interface import (
    ATTENTION,
    AttentionStep,
    KVCache,
    LayerShape,
    ShapeProbe,
    attention_step,
)
from reftserve.server.engine.attention.native import NativeCache

__all__ = ["ATTENTION", "AttentionStep", "KVCache", "LayerShape", "ShapeProbe", "attention_step", "make_cache"]


def make_cache(
    shapes: list[LayerShape],
    *,
    block_size: int,
    max_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    native: bool,
) -> KVCache:
    """The cache whose attention is fastest for this device and dtype. native: whether the CPU kernels are there.

    Raises EngineError when not even one block fits into max_bytes.
    """
    if native and device.type == "cpu" and dtype == torch.float32:
        return NativeCache(shapes, block_size=block_size, max_bytes=max_bytes)
    return GatheredCache(shapes, block_size=block_size, max_bytes=max_bytes, dtype=dtype, device=device)
