"""The Triton kernels in its CPU interpreter, which a separate process enables before it imports Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import batch_of, chunk, plain_attention
from torch import Tensor

from reftserve.server.base.attention import LayerShape
from reftserve.server.engine.kv_cache.cuda import CudaCache

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs inside the test that switches the interpreter on")


@pytest.mark.skipif(IS_INTERPRETED, reason="this process is the one it starts")
def test_the_kernels_pass_their_tests_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout, done.stdout


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("decode", "splits"), [(True, 1), (True, 8), (False, 1)])
@pytest.mark.parametrize("capability", [80, 90])
def test_attention_compiles_for_gpus_that_are_absent(
    decode: bool, splits: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reftserve.server.engine.kv_cache.triton import _attend, _shape

    # Llama 8B's heads in bfloat16.
    query = torch.empty(32, 4, 128, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(9, 32, 8, 128, dtype=torch.bfloat16, device="meta")
    constants = {"DECODE": decode, "SPLITS": splits, **_shape(query, keys, keys, 1 if decode else 16, None)}
    types = dict.fromkeys(("tables", "lengths", "first_rows", "tile_chunks", "tile_rows"), "*i32")
    types |= dict.fromkeys(("query", "keys", "values", "out"), "*bf16")
    types |= {"parts": "*fp32", "part_sums": "*fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    names = _attend.arg_names
    source = ASTSource(
        _attend,
        {name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024  # the smallest limit per block among the GPUs


def paged_cache(shape: LayerShape, blocks: int, block_size: int, splits: int | None, dtype: torch.dtype) -> CudaCache:
    from reftserve.server.engine.kv_cache.triton import TritonKernels

    bytes_per_block = block_size * shape.kv_heads * (shape.key_dim + shape.value_dim) * dtype.itemsize
    cache = CudaCache(
        [shape],
        block_size=block_size,
        max_bytes=blocks * bytes_per_block,
        dtype=dtype,
        device=torch.device("cpu"),
        kernels=TritonKernels(splits),
    )
    # Earlier contents of the blocks, of a value that would show in the result.
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    return cache


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=4
    ),
    block_size=st.sampled_from([1, 3, 16, 32]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (5, 1), (32, 1)]),
    dims=st.sampled_from([(8, 8), (64, 64), (20, 12), (7, 33)]),
    window=st.sampled_from([None, 1, 5, 30]),
    splits=st.sampled_from([None, 1, 2, 8]),
    seed=st.integers(0, 100),
)
def test_attention_over_scattered_blocks_equals_plain_attention_of_each_sequence(
    sequences: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    splits: int | None,
    seed: int,
) -> None:
    sequences.sort(key=lambda lengths: lengths[1] == 1 and lengths[0] > 0)
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    blocks = 140 * len(sequences)
    cache = paged_cache(LayerShape(kv_heads, *dims), blocks, block_size, splits, torch.float32)
    free = torch.randperm(blocks, generator=generator).tolist()

    def random(n: int, tokens: int, dim: int) -> Tensor:
        # As in a model: heads are the second dimension in memory.
        return torch.randn(tokens, n, dim, generator=generator).transpose(0, 1)

    tables = [[free.pop() for _ in range(-(-(start + new) // block_size))] for start, new in sequences]
    keys = [random(kv_heads, start + new, dims[0]) for start, new in sequences]
    values = [random(kv_heads, start + new, dims[1]) for start, new in sequences]
    queries = [random(query_heads, start + new, dims[0]) for start, new in sequences]

    def step(parts: list[tuple[int, int, int]]) -> Tensor:
        chunks = [chunk(tables[i], start, stop) for i, start, stop in parts]
        packed = [torch.cat([t[i][:, a:b] for i, a, b in parts], 1) for t in (queries, keys, values)]
        return cache.step(batch_of(chunks)).attend(0, *packed, None, window)

    earlier = [(i, 0, start) for i, (start, _) in enumerate(sequences) if start]
    if earlier:
        step(earlier)
    found = step([(i, start, start + new) for i, (start, new) in enumerate(sequences)])
    expected = [
        plain_attention(queries[i][:, start:], keys[i], values[i], start, window)
        for i, (start, _) in enumerate(sequences)
    ]
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=2e-5, rtol=2e-5)


@interpreted
def test_half_precision_is_as_close_as_its_rounding_allows() -> None:
    dtype = torch.float16  # the interpreter cannot multiply bfloat16
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 71, 64, generator=generator).to(dtype) for n in (6, 2, 2))
    cache = paged_cache(LayerShape(2, 64, 64), 10, 16, 2, dtype)
    blocks = [7, 1, 4, 0, 9]
    found = torch.cat(
        [
            cache.step(batch_of([chunk(blocks, start, stop)])).attend(
                0, *(t[:, start:stop] for t in (query, key, value)), None, None
            )
            for start, stop in ((0, 70), (70, 71))
        ]
    )
    assert found.dtype == dtype
    expected = plain_attention(query, key, value, 0, None)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


@interpreted
@pytest.mark.parametrize("splits", [1, 4])
def test_rows_of_length_zero_give_zeros_and_read_nothing(splits: int) -> None:
    from reftserve.server.engine.kv_cache.triton import TritonKernels

    cache = paged_cache(LayerShape(2, 16, 16), 4, 16, splits, torch.float32)
    tables, lengths = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    out = torch.full((3, 4, 16), torch.nan)
    TritonKernels(splits).decodes(torch.ones(4, 3, 16), cache.keys[0], cache.values[0], tables, lengths, 1.0, None, out)
    assert torch.equal(out, torch.zeros(3, 4, 16))
