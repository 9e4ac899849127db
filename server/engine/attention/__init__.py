"""Attention over the paged cache: the contract in interface.py, and one file for each way to meet it.

gathered.py  any device and dtype: blocks are gathered, then torch's attention runs over them
native.py    float32 on the CPU: a kernel that reads the cache where it lies
paged.py     CUDA with Triton: the same by the kernels of triton.py
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from reftserve.server.engine.attention.gathered import GatheredCache
from reftserve.server.engine.attention.interface import (
    ATTENTION,
    AttentionStep,
    KVCache,
    LayerShape,
    ShapeProbe,
    attention_step,
    current_step,
)
from reftserve.server.engine.attention.native import NativeCache
from reftserve.server.engine.attention.paged import PagedCache

__all__ = [
    "ATTENTION",
    "AttentionStep",
    "KVCache",
    "LayerShape",
    "ShapeProbe",
    "attention_step",
    "current_step",
    "make_cache",
]


def make_cache(
    shapes: list[LayerShape],
    *,
    block_size: int,
    max_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    native: bool,
    in_place: bool = True,
) -> KVCache:
    """The cache whose attention is fastest for this device and dtype.

    native: whether the CPU kernels are there. in_place: false gathers on CUDA too, for comparison.

    Raises EngineError when not even one block fits into max_bytes.
    """
    if native and device.type == "cpu" and dtype == torch.float32:
        return NativeCache(shapes, block_size=block_size, max_bytes=max_bytes)
    if in_place and device.type == "cuda" and find_spec("triton") is not None:
        # Not at the top: Triton compiles nothing without a GPU, and the CPU's installations have none.
        from reftserve.server.engine.attention.triton import TritonKernels

        return PagedCache(
            shapes,
            block_size=block_size,
            max_bytes=max_bytes,
            dtype=dtype,
            device=device,
            kernels=TritonKernels(),
        )
    return GatheredCache(shapes, block_size=block_size, max_bytes=max_bytes, dtype=dtype, device=device)
