"""The CPU kernels against plain torch: attention, norms, gated MLPs, rotary embeddings, and module replacement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from engine_oracle import random_edit
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import chunk, plain_attention
from plain_rotation import HEADS, plain_rotation
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from reftserve.interventions import Activation, compose
from reftserve.server.base.attention import ATTENTION, LayerShape, attention_step
from reftserve.server.base.cpu_kernels import load_kernels
from reftserve.server.base.fused import FusedMLP, FusedRMSNorm, Int8FusedMLP, fuse_modules
from reftserve.server.base.fused_attention import FusedAttention
from reftserve.server.base.model_errors import KernelsUnavailable
from reftserve.server.engine.kv_cache.cpu import CpuCache
from reftserve.server.engine.scheduler import Batch, Chunk

BLOCKS = 64


pytestmark = pytest.mark.usefixtures("kernels")


def batch_of(chunks: list[Chunk]) -> Batch:
    return Batch(prefills=chunks, decodes=[], stale_blocks=[])


sequences = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    sequences=sequences,
    block_size=st.sampled_from([1, 3, 16, 20, 32]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (5, 1)]),
    dims=st.sampled_from([(8, 8), (64, 64), (20, 12), (7, 33)]),
    window=st.sampled_from([None, 1, 5, 30]),
    seed=st.integers(0, 100),
)
def test_attention_over_scattered_blocks_equals_plain_attention_of_each_sequence(
    sequences: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    shape = LayerShape(kv_heads, *dims)
    size = -(-block_size // 16) * 16
    blocks = 80 * len(sequences)
    bytes_per_block = kv_heads * size * (dims[0] + -(-dims[1] // 16) * 16) * 4
    cache = CpuCache([shape], block_size=block_size, max_bytes=blocks * bytes_per_block)
    # Earlier contents of the blocks, of a value that would show in the result.
    cache.keys[0].fill_(torch.nan)
    cache.values[0][..., : dims[1]] = torch.nan
    free = torch.randperm(blocks, generator=generator).tolist()

    def random(n: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(n, tokens, dim, generator=generator)

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


def test_a_row_is_bitwise_independent_of_the_rest_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = LayerShape(2, 16, 16)
    cache = CpuCache([shape], block_size=16, max_bytes=BLOCKS * 2 * 16 * 32 * 4)
    query, key, value = (torch.randn(n, 70, 16, generator=generator) for n in (4, 2, 2))
    chunks = [chunk([0, 1], 0, 30), chunk([5, 3, 4], 0, 40)]
    together = cache.step(batch_of(chunks)).attend(0, query, key, value, None, None)
    alone = cache.step(batch_of(chunks[1:])).attend(0, query[:, 30:], key[:, 30:], value[:, 30:], None, None)
    assert torch.equal(together[30:], alone)


def test_a_token_is_unaffected_by_overflows_after_it() -> None:
    shape = LayerShape(1, 16, 16)
    cache = CpuCache([shape], block_size=16, max_bytes=BLOCKS * 16 * 32 * 4)
    query, key, value = (torch.ones(1, 12, 16) for _ in range(3))
    key[:, 11], value[:, 11] = torch.inf, torch.inf
    out = cache.step(batch_of([chunk([2], 0, 12)])).attend(0, query, key, value, None, None)
    assert torch.equal(out[:11], torch.ones(11, 1, 16))
    assert not out[11].isfinite().any()


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    size=st.integers(1, 70),
    edited=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=1, unique_by=lambda pair: pair[0]),
    seed=st.integers(0, 1000),
)
def test_edits_in_place_equal_the_reference_and_touch_no_other_row(
    ranks: list[int], size: int, edited: list[tuple[int, int]], seed: int
) -> None:
    edits = [
        random_edit(rank, size, seed + i, (seed + i) % len(Activation)).scaled(0.5 + i) for i, rank in enumerate(ranks)
    ]
    bank = compose(edits)
    columns = torch.zeros(len(edits), max(ranks), dtype=torch.int64)
    scale = torch.zeros(len(edits), max(ranks))
    for group, edit in enumerate(edits):
        columns[group, : edit.rank] = torch.arange(edit.rank) + sum(ranks[:group]) + 1
        scale[group, : edit.rank] = edit.scale
    # Row 0 of a bank belongs to no intervention, and no edit reads it.
    pool = {name: torch.cat([getattr(bank, name)[:1] * 0 - 1, getattr(bank, name)]) for name in ("A", "b", "U", "act")}
    hidden = torch.randn(12, size, generator=torch.Generator().manual_seed(seed))
    expected = hidden.clone()
    for row, group in edited:
        expected[row] = edits[group % len(edits)].apply(hidden[row : row + 1])[0]
    rows, owners = (torch.tensor(values) for values in zip(*edited, strict=True))
    torch.ops.reftserve.edit_rows(hidden, rows, owners % len(edits), columns, scale, *pool.values())
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    untouched = sorted(set(range(12)) - set(rows.tolist()))
    assert torch.equal(hidden[untouched], expected[untouched])


@pytest.mark.parametrize("size", [1, 15, 16, 100])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_a_norm_is_replaced_by_the_same_function(kind: type[nn.Module], size: int) -> None:
    holder = nn.ModuleList([kind(size)])
    norm = holder[0]
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(2)) * 5
    fuse_modules(holder, int8=False)
    assert type(holder[0]) is FusedRMSNorm
    torch.testing.assert_close(holder[0](x), norm(x), atol=1e-5, rtol=1e-5)


class NotQuiteRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.01


def test_modules_that_only_resemble_a_norm_or_an_mlp_are_kept() -> None:
    holder = nn.ModuleList([NotQuiteRMSNorm(16)])
    fuse_modules(holder, int8=False)
    assert type(holder[0]) is NotQuiteRMSNorm
    model = tiny_model("llama")
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    fuse_modules(model, int8=False)
    assert [type(layer.mlp) is FusedMLP for layer in model.model.layers] == [False, True, True]


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_mlp_is_replaced_by_the_same_function_or_a_close_one_in_int8(name: str, rows: int) -> None:
    x = torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(2))
    plain = tiny_model(name).requires_grad_(False)
    expected = plain.model.layers[0].mlp(x)
    for int8, kind, bound in ((False, FusedMLP, 1e-5), (True, Int8FusedMLP, 0.05)):
        model = tiny_model(name).requires_grad_(False)
        fuse_modules(model, int8=int8)
        mlp = model.model.layers[0].mlp
        assert type(mlp) is kind
        assert float((mlp(x) - expected).norm() / expected.norm()) < bound


@settings(max_examples=100, deadline=None)
@given(**HEADS)
def test_rotary_embeddings_in_place_equal_those_of_transformers(
    rows: int, heads: tuple[int, int], dim: int, rest: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cosines, sines = torch.randn(2, rows, dim, generator=generator)
    # Queries, keys and values are parts of one product, so their rows are not contiguous.
    widths = [n * (dim + rest) for n in heads]
    query, key, _ = torch.randn(rows, sum(widths) + 3, generator=generator).split([*widths, 3], dim=-1)
    expected = [plain_rotation(x, cosines, sines, dim + rest) for x in (query, key)]
    torch.ops.reftserve.rotate(query, key, cosines, sines, dim + rest)
    for found, rotated in zip((query, key), expected, strict=True):
        torch.testing.assert_close(found, rotated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "takes"),
    [("llama", 3), ("mistral", 3), ("nemotron", 3), ("qwen2", 3), ("qwen3", 3), ("gemma3", 4), ("gpt2", 0), ("opt", 0)],
)
def test_attention_that_rotates_halves_is_replaced(name: str, takes: int) -> None:
    """test_architectures.py shows for whole models that the results are the same."""
    for int8 in (False, True):
        model = tiny_model(name).requires_grad_(False)
        model.set_attn_implementation(ATTENTION)
        fuse_modules(model, int8=int8)
        assert sum(type(module) is FusedAttention for module in model.modules()) == takes


class RotatesBackwards(LlamaAttention):
    def forward(self, *args: Any, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
        cosines, sines = position_embeddings
        return super().forward(*args, position_embeddings=(cosines, -sines), **kwargs)


class Clamps(LlamaAttention):
    """Clamps like OLMo's `clip_qkv`, which few inputs reveal."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states=hidden_states.clamp(-1000, 1000), **kwargs)


class MayNotRotate(LlamaAttention):
    def forward(
        self, *args: Any, position_embeddings: tuple[Tensor, Tensor] | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rotation = position_embeddings or (torch.ones(1, 1, self.head_dim), torch.zeros(1, 1, self.head_dim))
        return super().forward(*args, position_embeddings=rotation, **kwargs)


@pytest.mark.parametrize("kind", [RotatesBackwards, Clamps, MayNotRotate])
def test_attention_with_another_formula_is_kept(kind: type[LlamaAttention]) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    model.model.layers[1].self_attn.__class__ = kind
    fuse_modules(model, int8=False)
    assert [type(layer.self_attn) for layer in model.model.layers] == [FusedAttention, kind, FusedAttention]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_inputs_of_attention_in_int8_are_close_to_float32(name: str) -> None:
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2))
    rotation = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(3)).unbind()
    given: list[tuple[Tensor, ...]] = []

    class Records:
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
            given.append((query.clone(), key.clone(), value.clone()))
            return torch.zeros(9, 4, 8)

    for int8 in (False, True):
        model = tiny_model(name).requires_grad_(False)
        model.set_attn_implementation(ATTENTION)
        fuse_modules(model, int8=int8)
        with attention_step(Records()):
            model.model.layers[0].self_attn(x, rotation)
    for exact, rounded in zip(*given, strict=True):
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05


@settings(max_examples=60, deadline=None)
@given(mates=st.integers(0, 20), scale=st.floats(1e-3, 1e6))
def test_a_row_of_an_int8_mlp_is_bitwise_independent_of_the_other_rows(mates: int, scale: float) -> None:
    model = tiny_model("llama").requires_grad_(False)
    fuse_modules(model, int8=True)
    mlp = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(mates)
    mine, others = torch.randn(1, 32, generator=generator), torch.randn(mates, 32, generator=generator) * scale
    assert torch.equal(mlp(torch.cat([others, mine]))[-1], mlp(mine)[0])


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_non_finite_values_stay_visible_in_their_own_row(wrong: float) -> None:
    model = tiny_model("llama").requires_grad_(False)
    fuse_modules(model, int8=True)
    x = torch.ones(2, 32)
    x[0, 3] = wrong
    out = model.model.layers[0].mlp(x)
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()


def refuses(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no g++")


def test_a_failed_compile_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", refuses)
    for _ in range(2):  # a failed compile is not taken for a complete one
        with pytest.raises(KernelsUnavailable, match="install g"):
            load_kernels.__wrapped__()


def test_the_kernels_load_without_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PATH")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *args, **kwargs: None)
    load_kernels.__wrapped__()


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_a_home_folder_that_cannot_hold_the_kernels_is_named(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(KernelsUnavailable, match="set HOME or TORCH_EXTENSIONS_DIR"):
        load_kernels.__wrapped__()


def test_kernels_that_another_checkout_compiled_are_not_compiled_again(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.load", refuses)
    load_kernels.__wrapped__()
