"""Attention of a training pass over packed spans (`spans.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reftserve.server.training.spans import Span, VarlenRows

FEW_ROWS = 16  # up to this width, stacking a group's query heads as rows is cheaper than repeating the keys

KeysValues = tuple[Tensor, Tensor]
Seen = Callable[[int, Tensor, Tensor], None]  # takes a layer's new keys and values, [kv_heads, rows, dim]


class Prefixes(Protocol):
    """The cached keys and values of the tokens before each span."""

    def of(self, layer: int) -> Sequence[Tensor]:
        """Return one [2, kv_heads, start, dim] per span."""
        ...


class SpanAttention:
    """Attention of each span to its cached prefix and to itself, by the CPU kernel in float32, without padding."""

    def __init__(self, rows: VarlenRows, prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        self._widths = [span.rows for span in rows.spans]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attend, [heads, rows, dim] -> [rows, heads, dim]."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        before = self._prefixes.of(layer)
        out: Tensor = torch.ops.reftserve.span_attention(query, key, value, before, self._widths, scale, window or 0)
        return out


class VarlenAttention:
    """Attention of each span to its prefix or parent and to itself, by PyTorch, padded to the widest span."""

    def __init__(self, rows: VarlenRows, prefixes: Prefixes | None, seen: Seen | None = None) -> None:
        self._prefixes, self._seen = prefixes, seen
        roots, children = rows.spans[: rows.roots], rows.spans[rows.roots :]
        self._roots = _PaddedSpans(roots, rows.device, has_before=prefixes is not None)
        self._children = _PaddedSpans(children, rows.device, has_before=True) if children else None
        self._parents = torch.tensor(rows.parents, device=rows.device)
        self._longest_parent = max((span.start for span in children), default=0)
        self._sizes = [sum(span.rows for span in part) for part in (roots, children)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attend, [heads, rows, dim] -> [rows, heads, value_dim]."""
        if self._seen is not None:
            self._seen(layer, key, value)
        before = None if self._prefixes is None else _padded(self._prefixes.of(layer))
        if self._children is None:
            query, key, value = (self._roots.padded(tensor) for tensor in (query, key, value))
            return self._roots.attend(query, key, value, before, scale, window)
        halves = [torch.split(tensor, self._sizes, dim=1) for tensor in (query, key, value)]
        query, key, value = (self._roots.padded(half) for half, _ in halves)
        roots = self._roots.attend(query, key, value, before, scale, window)
        before = self._of_parents(key), self._of_parents(value)
        query, key, value = (self._children.padded(half) for _, half in halves)
        return torch.cat([roots, self._children.attend(query, key, value, before, scale, window)])

    def _of_parents(self, roots: Tensor) -> Tensor:
        """Select each child's parent: [roots, kv_heads, width, dim] -> [children, kv_heads, longest parent, dim]."""
        return roots[:, :, : self._longest_parent].index_select(0, self._parents)


class _PaddedSpans:
    def __init__(self, spans: Sequence[Span], device: torch.device, *, has_before: bool) -> None:
        widths = torch.tensor([span.rows for span in spans], device=device)
        column = torch.arange(int(widths.max()), device=device)
        offsets = widths.cumsum(0) - widths
        self._has_before = has_before
        self._real = column < widths[:, None]
        # Padding repeats a span's last row, so it is finite. No row attends to it, and its output is dropped.
        self._padded = offsets[:, None] + torch.minimum(column, widths[:, None] - 1)
        self._is_dense = bool(self._real.all())
        self._starts = torch.tensor([span.start for span in spans], device=device)
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def padded(self, tensor: Tensor) -> Tensor:
        """Pad, [heads, rows, dim] -> [spans, heads, width, dim]."""
        heads, _, dim = tensor.shape
        if self._is_dense:
            return tensor.reshape(heads, *self._padded.shape, dim).transpose(0, 1)
        # Select whole rows: the gradient of an index into a later dimension is far slower.
        by_row = tensor.transpose(0, 1).flatten(1).index_select(0, self._padded.flatten())
        return by_row.view(*self._padded.shape, heads, dim).transpose(1, 2)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        before: KeysValues | None,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Attend, [spans, heads, width, dim] -> [rows, heads, value_dim]. before: as `_padded` returns it."""
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        width = query.shape[2]
        if before is None and (window is None or width <= window):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        elif width <= FEW_ROWS:
            out = self._grouped(query, key, value, scale, window)
        else:
            mask = self._mask(window, 1)
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        by_row = out.transpose(1, 2)  # [spans, width, heads, dim]
        return by_row.flatten(0, 1) if self._is_dense else by_row[self._real]

    def _grouped(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        spans, heads, width, _ = query.shape
        group = heads // key.shape[1]
        rows = query.reshape(spans, key.shape[1], group * width, -1)
        out = scaled_dot_product_attention(rows, key, value, attn_mask=self._mask(window, group), scale=scale)
        return out.reshape(spans, heads, width, -1)

    def _mask(self, window: int | None, group: int) -> Tensor:
        """Return which keys each query may attend to, [spans, 1, group * width, longest start + width]."""
        if (window, group) not in self._masks:
            spans, width = self._padded.shape
            longest = int(self._starts.max()) if self._has_before else 0
            column = torch.arange(width, device=self._starts.device)
            before = torch.arange(longest, device=self._starts.device)
            query_at = self._starts[:, None] + column  # [spans, width]
            key_at = torch.cat([before.expand(spans, -1), query_at], dim=1)
            known = torch.cat([before < self._starts[:, None], self._real], dim=1)
            mask = known[:, None] & (key_at[:, None] <= query_at[:, :, None])
            if window is not None:
                mask &= key_at[:, None] > query_at[:, :, None] - window
            self._masks[window, group] = mask.repeat(1, group, 1).unsqueeze(1)
        return self._masks[window, group]


def _padded(prefixes: Sequence[Tensor]) -> KeysValues:
    """Pad, one [2, kv_heads, start, dim] per span -> keys and values, [spans, kv_heads, longest start, dim] each."""
    _, heads, _, dim = prefixes[0].shape
    longest = max(each.shape[2] for each in prefixes)
    both = prefixes[0].new_zeros(2, len(prefixes), heads, longest, dim)
    for index, each in enumerate(prefixes):
        both[:, index, :, : each.shape[2]] = each
    return both[0], both[1]
