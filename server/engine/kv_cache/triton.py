"""The kernels of the paged cache in Triton: storing keys and values, attention of prompts and of decode tokens.

A program holds a tile of query rows, `tokens * heads of one group`, because query heads of one key-value head share its
keys. It walks over the keys `KEYS` at a time with a running softmax (Dao et al. 2022) and looks up each key's block.
If decode tokens are too few to fill the device, several programs share a row's keys, and `_merge` weighs their parts
(Dao et al. 2023). The number of programs depends on the number of rows only, because the host does not know lengths.
"""

# Triton has no types, and its kernels' parameters are not Python objects.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reftserve.server.engine.kv_cache.cuda import PromptRows

LOG2_E = 1.4426950408889634
SMALLEST_DOT = 16  # fewest rows and columns of a product on tensor cores
TILE_ROWS = 64
MAX_SPLITS = 16
PROGRAMS_PER_SM = 2
CPU_SMS = 1  # in Triton's interpreter


@triton.jit
def _store(
    keys, values, slots, key, value, key_head, key_row, value_head, value_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    i = tl.arange(0, WIDTH)
    new = tl.load(key + i // DIM * key_head + row * key_row + i % DIM, mask=i < HEADS * DIM)
    tl.store(keys + slot * (HEADS * DIM) + i, new, mask=i < HEADS * DIM)
    new = tl.load(value + i // VALUE_DIM * value_head + row * value_row + i % VALUE_DIM, mask=i < HEADS * VALUE_DIM)
    tl.store(values + slot * (HEADS * VALUE_DIM) + i, new, mask=i < HEADS * VALUE_DIM)


@triton.jit
def _attend(
    query, keys, values, tables, lengths, first_rows, tile_chunks, tile_rows, out, parts, part_sums,
    query_head, query_row, out_row, table_row, scale, num_rows,
    DECODE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (tiles, kv_heads, splits). A chunk is a sequence; in DECODE it has one row and is its own tile."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if DECODE:
        chunk = tile
        first = tile
        count = 1
        start = 0
    else:
        chunk = tl.load(tile_chunks + tile)
        start = tl.load(tile_rows + tile)
        first = tl.load(first_rows + chunk)
        count = tl.load(first_rows + chunk + 1) - first
    length = tl.load(lengths + chunk)
    m = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    dv = tl.arange(0, VALUE_WIDTH)
    token = start + m // GROUP
    head = kv_head * GROUP + m % GROUP
    real = (m < TOKENS * GROUP) & (token < count)
    row = first + token
    position = length - count + token
    place = row[:, None] * query_row + head[:, None] * query_head + d[None, :]
    q = tl.load(query + place, mask=real[:, None] & (d < DIM)[None, :], other=0.0)

    # The keys that any row of the tile sees, then the split's share of them.
    end = tl.minimum(length, length - count + start + TOKENS)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - count + start - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    begin += split * share
    end = tl.minimum(end, begin + share)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for at in range(begin, end, KEYS):
        key_at = at + tl.arange(0, KEYS)
        seen = key_at < end
        block = tl.load(tables + chunk * table_row + key_at // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        slot = (block * BLOCK_SIZE + key_at % BLOCK_SIZE) * HEADS + kv_head
        k = tl.load(keys + slot[None, :] * DIM + d[:, None], mask=seen[None, :] & (d < DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        visible = seen[None, :] & (key_at[None, :] <= position[:, None])
        if WINDOW > 0:
            visible &= key_at[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        # For a row without keys so far, -inf - -inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        faded = tl.exp2(top - base)
        total = total * faded + tl.sum(weights, 1)
        value_mask = seen[:, None] & (dv < VALUE_DIM)[None, :]
        v = tl.load(values + slot[:, None] * VALUE_DIM + dv[None, :], mask=value_mask, other=0.0)
        sums = sums * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = highest

    # 0 means that the row saw no key in this split.
    weight = tl.where(total == 0.0, 1.0, total)
    result = sums / weight[:, None]
    mask = real[:, None] & (dv < VALUE_DIM)[None, :]
    if SPLITS == 1:
        place = row[:, None] * out_row + head[:, None] * VALUE_DIM + dv[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)
    else:
        part = (split * num_rows + row) * (HEADS * GROUP) + head
        tl.store(parts + part[:, None] * VALUE_DIM + dv[None, :], result, mask=mask)
        tl.store(part_sums + part, tl.where(total == 0.0, float("-inf"), top + tl.log2(weight)), mask=real)


@triton.jit
def _merge(
    parts, part_sums, out, out_row, num_rows,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge splits. Grid: (rows, heads). parts: [splits, rows, heads, value_dim]; part_sums: log2 of their weights."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    dv = tl.arange(0, VALUE_WIDTH)
    split = tl.arange(0, SPLITS)
    part = (split * num_rows + row) * HEADS + head
    logs = tl.load(part_sums + part)
    highest = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    mask = dv < VALUE_DIM
    part_mask = mask[None, :] & (weights >= 0.0)[:, None]
    values = tl.load(parts + part[:, None] * VALUE_DIM + dv[None, :], mask=part_mask, other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_row + head * VALUE_DIM + dv, result.to(out.dtype.element_ty), mask=mask)


class TritonKernels:
    """The kernels on the device. splits: programs that share a decode row's keys, a power of two; None: from rows."""

    def __init__(self, splits: int | None = None) -> None:
        self._splits = splits

    def store(self, keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write key and value [kv_heads, rows, dim] to their slots."""
        heads, rows, dim = key.shape
        key, value = _dense_rows(key), _dense_rows(value)
        width = triton.next_power_of_2(heads * max(dim, value.shape[-1]))
        _store[rows,](
            keys, values, slots, key, value, *key.stride()[:2], *value.stride()[:2],
            DIM=dim, VALUE_DIM=value.shape[-1], HEADS=heads, WIDTH=width,
        )  # fmt: skip

    def prompts(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: PromptRows,
        tiles: dict[int, Tensor],
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Let each row attend to its sequence up to itself."""
        tokens = max(1, TILE_ROWS // (query.shape[0] // keys.shape[2]))
        if tokens not in tiles:
            tiles[tokens] = rows.tiles(tokens)
        chunks, starts = tiles[tokens]
        shape = _shape(query, keys, values, tokens, window)
        query = _dense_rows(query)
        _attend[len(chunks), keys.shape[2], 1](
            query, keys, values, rows.tables, rows.lengths, rows.first_rows, chunks, starts, out, out, out,
            *query.stride()[:2], out.stride(0), rows.tables.stride(0), scale * LOG2_E, out.shape[0],
            DECODE=False, SPLITS=1, **shape,
        )  # fmt: skip

    def decodes(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Let row i attend to the first lengths[i] tokens in blocks tables[i]."""
        (heads, rows, _), kv_heads, value_dim = query.shape, keys.shape[2], values.shape[-1]
        splits = self._splits or _splits(query.device, rows * kv_heads)
        parts = part_sums = out
        if splits > 1:
            parts = out.new_empty(splits, rows, heads, value_dim, dtype=torch.float32)
            part_sums = out.new_empty(splits, rows, heads, dtype=torch.float32)
        shape = _shape(query, keys, values, 1, window)
        query = _dense_rows(query)
        _attend[rows, kv_heads, splits](
            query, keys, values, tables, lengths, lengths, lengths, lengths, out, parts, part_sums,
            *query.stride()[:2], out.stride(0), tables.stride(0), scale * LOG2_E, rows,
            DECODE=True, SPLITS=splits, **shape,
        )  # fmt: skip
        if splits > 1:
            _merge[rows, heads](
                parts, part_sums, out, out.stride(0), rows,
                SPLITS=splits, HEADS=heads, VALUE_DIM=value_dim, VALUE_WIDTH=triton.next_power_of_2(value_dim),
            )  # fmt: skip


def _shape(query: Tensor, keys: Tensor, values: Tensor, tokens: int, window: int | None) -> dict[str, Any]:
    heads, _, dim = query.shape
    _, block_size, kv_heads, value_dim = values.shape
    group = heads // kv_heads
    rows = max(SMALLEST_DOT, triton.next_power_of_2(tokens * group))
    width, value_width = (max(SMALLEST_DOT, triton.next_power_of_2(size)) for size in (dim, value_dim))
    # Keys and values that a program holds at a time: 64 in bfloat16 with 128 numbers each, fewer larger ones.
    held = 64 * 128 * 2 // (max(width, value_width) * keys.element_size())
    return {
        "WINDOW": window or 0,
        "HEADS": kv_heads,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "TOKENS": tokens,
        "ROWS": rows,
        "KEYS": min(64, max(SMALLEST_DOT, held)),
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
    }


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _splits(device: torch.device, programs: int) -> int:
    """Return how many programs share a row's keys, so that every multiprocessor has enough."""
    splits = max(1, PROGRAMS_PER_SM * _multiprocessors(device) // programs)
    return min(MAX_SPLITS, 1 << (splits.bit_length() - 1))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_SMS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
