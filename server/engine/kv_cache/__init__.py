"""The paged cache of keys and values: interface.py has the contract, and each implementation is one file.

gathered.py  any device and dtype: gathers blocks, then torch's attention runs over them
cpu.py       float32 on the CPU: a C++ kernel reads the blocks in place
cuda.py      CUDA with Triton: the kernels of triton.py read the blocks in place
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from reftserve.server.base.attention import LayerShape
from reftserve.server.engine.kv_cache.cpu import CpuCache
from reftserve.server.engine.kv_cache.cuda import CudaCache
from reftserve.server.engine.kv_cache.gathered import GatheredCache
from reftserve.server.engine.kv_cache.interface import KVCache


def make_cache(
    shapes: list[LayerShape],
    *,
    block_size: int,
    max_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    has_kernel: bool,
    in_place: bool = True,
) -> KVCache:
    """Return the fastest cache for this device and dtype. has_kernel: whether the CPU's attention kernel runs.

    in_place: False gathers on CUDA too, for comparison. Raises EngineError when no block fits into max_bytes.
    """
    if has_kernel and device.type == "cpu" and dtype == torch.float32:
        return CpuCache(shapes, block_size=block_size, max_bytes=max_bytes)
    if in_place and device.type == "cuda" and find_spec("triton") is not None:
        # Imported here because CPU installations have no Triton.
        from reftserve.server.engine.kv_cache.triton import TritonKernels

        return CudaCache(
            shapes,
            block_size=block_size,
            max_bytes=max_bytes,
            dtype=dtype,
            device=device,
            kernels=TritonKernels(),
        )
    return GatheredCache(shapes, block_size=block_size, max_bytes=max_bytes, dtype=dtype, device=device)
