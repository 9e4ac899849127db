"""The forward pass of training runs the frozen base over packed rows (`spans.py`). Only attention may pad them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reftserve.interventions import decoder_layers, edit_layer
from reftserve.server.base.attention import ATTENTION, AttentionStep, attention_step
from reftserve.server.base.fused import fuse_modules
from reftserve.server.base.kernel_choice import ALL_KERNELS, KernelChoice
from reftserve.server.base.panels import pack_linears, takes_kernels
from reftserve.server.training.spans import VarlenRows
from reftserve.server.training.training_kernels import takes_span_attention
from reftserve.server.training.varlen_attention import Prefixes, Seen, SpanAttention, VarlenAttention


@dataclass(frozen=True)
class RowEdit:
    """An edit of a layer's output: `delta`, a function of the rows [edited, hidden], is added to rows [edited]."""

    rows: Tensor
    delta: Callable[[Tensor], Tensor]


class VarlenModel:
    """A frozen base over packed rows. It replaces the model's attention. kernels: CPU kernels to use, in float32."""

    def __init__(self, model: PreTrainedModel, *, kernels: KernelChoice = ALL_KERNELS) -> None:
        self.model = model
        self.device = model.device
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.layers = decoder_layers(model)
        model.set_attn_implementation(ATTENTION)
        self._attends_by_kernel = False
        if takes_kernels(model) and kernels.load():
            pack_linears(model, kernels)
            fuse_modules(model, int8=False, kernels=kernels)
            self._attends_by_kernel = takes_span_attention(kernels, model.config.get_text_config())

    def logits(
        self,
        rows: VarlenRows,
        edits: Mapping[int, Sequence[RowEdit]],
        *,
        prefixes: Prefixes | None = None,
        begin: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Return logits [targets, vocabulary]. begin: a layer and its kept output [rows, hidden] to start from."""
        with ExitStack() as stack:
            if begin is not None:
                layer, hidden = begin
                stack.enter_context(self._replaced(range(layer), lambda given: given))
                stack.enter_context(self._replaced([layer], lambda _: hidden.unsqueeze(0)))
            for number, at_layer in edits.items():
                stack.enter_context(edit_layer(self.layers[number], partial(_add, at_layer)))
            attention: AttentionStep
            if self._attends_by_kernel and prefixes is not None and not rows.parents:
                attention = SpanAttention(rows, prefixes)
            else:
                attention = VarlenAttention(rows, prefixes)
            return self._forward(rows, attention, rows.target_rows)

    @torch.no_grad()
    def constants(self, rows: VarlenRows, layer: int, seen: Seen, *, above: bool) -> Tensor:
        """Return the base's output of a layer, [rows, hidden]. above: give `seen` higher layers' keys and values."""
        found: list[Tensor] = []

        def record(hidden: Tensor) -> None:
            found.append(hidden[0])

        def seen_above(number: int, key: Tensor, value: Tensor) -> None:
            if number > layer:
                seen(number, key, value)

        with ExitStack() as stack:
            stack.enter_context(edit_layer(self.layers[layer], record))
            if not above:
                stack.enter_context(self._replaced(range(layer + 1, len(self.layers)), lambda given: given))
            self._forward(rows, VarlenAttention(rows, None, seen_above), rows.target_rows[:1])
        return found[0]

    def _forward(self, rows: VarlenRows, attention: AttentionStep, kept: Tensor) -> Tensor:
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
        """Make these layers compute `output` of their input instead. Their hooks still run."""
        for number in numbers:
            self.layers[number].forward = lambda hidden_states, *_, **__: output(hidden_states)
        try:
            yield
        finally:
            for number in numbers:
                del self.layers[number].forward


def _add(edits: Sequence[RowEdit], hidden: Tensor) -> Tensor:
    """Edit hidden [1, rows, hidden] out of place, for gradients. Every edit reads the unedited rows."""
    rows = edited = hidden[0]
    for edit in edits:
        edited = edited.index_add(0, edit.rows, edit.delta(rows[edit.rows]).to(hidden.dtype))
    return edited.unsqueeze(0)
