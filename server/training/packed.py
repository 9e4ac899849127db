"""The forward pass of training: examples side by side in one row of tokens, nothing padded but inside attention.

Of each example a pass computes a *span*: the tokens from `start` on. What lies before is constant, and attention reads
its kept keys and values; the layers up to the lowest edited one are constant too, so a pass may begin with the kept
output of that layer (`trunk.py` keeps both).

    rows      tokens of all spans, one after another       [rows]
    targets   rows whose logits predict a completion token [targets]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from reftserve.interventions import decoder_layers
from reftserve.server.engine.attention import ATTENTION, attention_step
from reftserve.server.engine.native import load_kernels
from reftserve.server.engine.packed_linear import pack_linears, takes_kernels
from reftserve.server.training.data import EncodedExample

FEW_ROWS = 16  # of a sequence: up to here query heads of one key-value head are cheaper as rows than with repeated keys


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) of an example; the last token only has to be predicted."""

    example: EncodedExample
    start: int

    @property
    def stop(self) -> int:
        """One behind the last token that predicts."""
        return self.example.length - 1

    @property
    def rows(self) -> int:
        """Tokens that a pass computes."""
        return self.stop - self.start


class PackedRows:
    """Spans as tensors. input_ids, positions: [rows]. target_rows, labels: [targets]. offsets: first row of a span."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans = spans
        self.offsets: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        target_rows: list[int] = []
        labels: list[int] = []
        for span in spans:
            example, offset = span.example, len(ids)
            self.offsets.append(offset)
            ids += (example.prompt_ids + example.completion_ids)[span.start : span.stop]
            positions += range(span.start, span.stop)
            first = offset + len(example.prompt_ids) - 1 - span.start
            target_rows += range(first, first + len(example.completion_ids))
            labels += example.completion_ids
        self.input_ids, self.positions, self.target_rows, self.labels = (
            torch.tensor(values, device=device) for values in (ids, positions, target_rows, labels)
        )


class Prefixes(Protocol):
    """Keys and values of the tokens before each span."""

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """[spans, kv_heads, longest start, dim] each; what lies behind a span's start is never read."""
        ...


@dataclass(frozen=True)
class RowEdit:
    """What is added to rows [edited] of a layer's output: `delta` of those rows, [edited, hidden]."""

    rows: Tensor
    delta: Callable[[Tensor], Tensor]


Seen = Callable[[int, Tensor, Tensor], None]


class PackedAttention:
    """Each span attends to its prefix and to itself (an `AttentionStep` of the engine's attention function).

    seen: is told each layer's new keys and values, [kv_heads, rows, dim].
    """

    def __init__(self, rows: PackedRows, prefixes: Prefixes | None, seen: Seen | None = None) -> None:
        self._prefixes, self._seen = prefixes, seen
        device = rows.input_ids.device
        widths = torch.tensor([span.rows for span in rows.spans], device=device)
        column = torch.arange(int(widths.max()), device=device)
        offsets = torch.tensor(rows.offsets, device=device)
        self._real = column < widths[:, None]
        # Padding repeats a span's last row: it is finite, nobody attends to it, and nobody reads what it attends to.
        self._padded = offsets[:, None] + torch.minimum(column, widths[:, None] - 1)
        self._is_dense = bool(self._real.all())
        self._starts = torch.tensor([span.start for span in rows.spans], device=device)
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """[heads, rows, dim] -> [rows, heads, value_dim]."""
        if self._seen is not None:
            self._seen(layer, key, value)
        query, key, value = (self._by_span(tensor) for tensor in (query, key, value))
        if self._prefixes is not None:
            prefix_keys, prefix_values = self._prefixes.at(layer)
            key, value = torch.cat([prefix_keys, key], dim=2), torch.cat([prefix_values, value], dim=2)
        width = query.shape[2]
        if self._prefixes is None and (window is None or width <= window):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        elif width <= FEW_ROWS:
            out = self._grouped(query, key, value, scale, window)
        else:
            mask = self._mask(window, 1)
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        by_row = out.transpose(1, 2)  # [spans, width, heads, dim]
        return by_row.flatten(0, 1) if self._is_dense else by_row[self._real]

    def _by_span(self, tensor: Tensor) -> Tensor:
        """[heads, rows, dim] -> [spans, heads, width, dim]."""
        heads, _, dim = tensor.shape
        if self._is_dense:
            return tensor.reshape(heads, *self._padded.shape, dim).transpose(0, 1)
        return tensor[:, self._padded].transpose(0, 1)

    def _grouped(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        spans, heads, width, _ = query.shape
        group = heads // key.shape[1]
        rows = query.reshape(spans, key.shape[1], group * width, -1)
        out = scaled_dot_product_attention(rows, key, value, attn_mask=self._mask(window, group), scale=scale)
        return out.reshape(spans, heads, width, -1)

    def _mask(self, window: int | None, group: int) -> Tensor:
        """Who may look at whom, [spans, 1, group * width, prefix + width]."""
        if (window, group) not in self._masks:
            spans, width = self._padded.shape
            prefix = 0 if self._prefixes is None else int(self._starts.max())
            column = torch.arange(width, device=self._starts.device)
            before = torch.arange(prefix, device=self._starts.device)
            query_at = self._starts[:, None] + column  # [spans, width]
            key_at = torch.cat([before.expand(spans, -1), query_at], dim=1)
            known = torch.cat([before < self._starts[:, None], self._real], dim=1)
            mask = known[:, None] & (key_at[:, None] <= query_at[:, :, None])
            if window is not None:
                mask &= key_at[:, None] > query_at[:, :, None] - window
            self._masks[window, group] = mask.repeat(1, group, 1).unsqueeze(1)
        return self._masks[window, group]


class PackedModel:
    """A frozen base whose forward passes run over packed rows. Takes the model over: its attention is replaced.

    native_kernels: on the CPU in float32, compute linear layers by the engine's kernel, from the engine's panels.
    """

    def __init__(self, model: PreTrainedModel, *, native_kernels: bool = True) -> None:
        self.model = model
        self.device = model.device
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.layers = decoder_layers(model)
        model.set_attn_implementation(ATTENTION)
        if native_kernels and takes_kernels(model):
            load_kernels()
            pack_linears(model)

    def logits(
        self,
        rows: PackedRows,
        edits: Mapping[int, Sequence[RowEdit]],
        *,
        prefixes: Prefixes | None = None,
        begin: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits [targets, vocabulary]. begin: a layer and its kept output [rows, hidden]; the pass starts there."""
        with ExitStack() as stack:
            if begin is not None:
                layer, hidden = begin
                stack.enter_context(self._replaced(range(layer), lambda given: given))
                stack.enter_context(self._replaced([layer], lambda _: hidden.unsqueeze(0)))
            for number, at_layer in edits.items():
                handle = self.layers[number].register_forward_hook(_edit_hook(at_layer))
                stack.callback(handle.remove)
            return self._forward(rows, PackedAttention(rows, prefixes), rows.target_rows)

    @torch.no_grad()
    def constants(self, rows: PackedRows, layer: int, seen: Seen, *, above: bool) -> Tensor:
        """The base's output of a layer, [rows, hidden]; `seen` is told the keys and values of the layers above it.

        above: whether anyone wants those.
        """
        found: list[Tensor] = []

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(_hidden(output)[0])

        def seen_above(number: int, key: Tensor, value: Tensor) -> None:
            if number > layer:
                seen(number, key, value)

        with ExitStack() as stack:
            stack.callback(self.layers[layer].register_forward_hook(hook).remove)
            if not above:
                stack.enter_context(self._replaced(range(layer + 1, len(self.layers)), lambda given: given))
            self._forward(rows, PackedAttention(rows, None, seen_above), rows.target_rows[:1])
        return found[0]

    def _forward(self, rows: PackedRows, attention: PackedAttention, kept: Tensor) -> Tensor:
        with attention_step(attention):
            output = self.model(
                input_ids=rows.input_ids.unsqueeze(0),
                position_ids=rows.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=kept,
            )
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _replaced(self, numbers: Sequence[int], output: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """These layers compute `output` of their input instead; hooks on them run as ever."""
        for number in numbers:
            self.layers[number].forward = lambda hidden_states, *_, **__: output(hidden_states)
        try:
            yield
        finally:
            for number in numbers:
                del self.layers[number].forward


def _edit_hook(edits: Sequence[RowEdit]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = _hidden(output)[0]
        edited = hidden  # every edit reads the unedited rows
        for edit in edits:
            edited = edited.index_add(0, edit.rows, edit.delta(hidden[edit.rows]).to(hidden.dtype))
        edited = edited.unsqueeze(0)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
