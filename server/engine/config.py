"""The engine process's configuration: one line of JSON on its standard input."""

from __future__ import annotations

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True):
    """Sizes and paths of one engine: resolved values of settings. weights_folder: None for private weights."""

    model_folder: str
    weights_folder: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    kv_cache_bytes: int = 1 << 30
    block_size: int = 32
    max_batch_tokens: int = 512
    max_sequences: int = 64
    bank_bytes: int = 256 << 20
    host_bytes: int = 1 << 30
    prefix_cache: bool = True
    quantization: Literal["none", "int8"] = "none"
    cpu_kernels: Literal["auto", "always", "never"] = "auto"
    cuda_graphs: bool = True
