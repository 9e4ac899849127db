"""Runs the base model over a batch: packs the tokens, applies the edits, returns the logits to sample from.

The model is transformers' own. Attention goes through the registered function, edits through one forward hook at each
decoder layer, which returns at once when the step edits nothing there. On the CPU faster modules replace some modules
(`base/panels.py`, `fused.py`, `fused_attention.py`, `int8.py`); transformers' code stays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reftserve.interventions import decoder_layers, edit_layer
from reftserve.server.base.attention import ATTENTION, AttentionStep, LayerShape, ShapeProbe, attention_step
from reftserve.server.base.fused import fuse_modules
from reftserve.server.base.int8 import found_siblings, round_linears
from reftserve.server.base.kernel_choice import ALL_KERNELS, KernelChoice
from reftserve.server.base.model_errors import UnsupportedModel
from reftserve.server.base.panels import Linear, pack_linears, takes_kernels
from reftserve.server.engine.bank import Bank
from reftserve.server.engine.decode_graphs import Compute, DecodeGraphs, record_cuda_graph
from reftserve.server.engine.edit_plan import DecodeEdits, LayerEdits, plan_edits
from reftserve.server.engine.engine_kernels import takes_edit_rows, takes_paged_attention
from reftserve.server.engine.kv_cache import make_cache
from reftserve.server.engine.kv_cache.cuda import CudaCache
from reftserve.server.engine.scheduler import Batch
from reftserve.server.engine.transfers import to_device

# These scale positions by the longest sequence of the batch, so one request would change another (I1).
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Logits(NamedTuple):
    """A step's logits in packed order, [rows, vocabulary]: of chunks that sample a token, and of tokens to score."""

    sampling: Tensor
    scoring: Tensor


class Runner:
    """The base model with its cache and bank. int8: compute linear layers in 8 bits, with the CPU kernels.

    kernels: those that compute float32 on the CPU; torch computes the rest. in_place: see `make_cache`.
    recorded_rows: most sequences of a decode step that is recorded as a CUDA graph; 0 records none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_cache_bytes: int,
        block_size: int,
        bank_bytes: int,
        int8: bool = False,
        kernels: KernelChoice = ALL_KERNELS,
        recorded_rows: int = 0,
        in_place: bool = True,
    ) -> None:
        _check_supported(model)
        has_kernels = takes_kernels(model) and kernels.load()
        if int8 and not has_kernels:
            raise UnsupportedModel(
                "quantization int8 is served on the CPU, from float32 weights, with its C++ kernels; "
                f"this model is {model.dtype} on {model.device}. {kernels.missing}"
            )
        if has_kernels and not int8:
            pack_linears(model, kernels)
        self.model = model
        self.device = model.device
        model.set_attn_implementation(ATTENTION)
        self.config = model.config.get_text_config()
        self._edits: Mapping[int, LayerEdits | DecodeEdits] = {}
        watch: AbstractContextManager[list[list[Linear]]] = found_siblings(model) if int8 else nullcontext([])
        with watch as siblings:
            shapes = self._probe_shapes()
        if has_kernels:
            fuse_modules(model, int8=int8, kernels=kernels)
        if int8:
            round_linears(model, siblings)
        self.cache = make_cache(
            shapes,
            block_size=block_size,
            max_bytes=kv_cache_bytes,
            dtype=model.dtype,
            device=self.device,
            has_kernel=has_kernels and takes_paged_attention(kernels, self.config, shapes[0], block_size),
            in_place=in_place,
        )
        self.max_context: int = min(self.config.max_position_embeddings, self.cache.num_blocks * self.cache.block_size)
        self.bank = Bank(self.config.hidden_size, max_bytes=bank_bytes, device=self.device)
        self._edits_by_kernel = has_kernels and takes_edit_rows(kernels, self.config.hidden_size)
        for index, layer in enumerate(decoder_layers(model)):
            edit_layer(layer, partial(self._edit, index))
        self._graphs: DecodeGraphs | None = None
        if recorded_rows and self.device.type == "cuda":
            self.record_decodes(recorded_rows, record_cuda_graph(self.device))

    @torch.inference_mode()
    def record_decodes(self, max_rows: int, record: Callable[[Compute], Compute]) -> None:
        """Record decode steps of up to max_rows sequences and replay them from now on, if the cache allows it."""
        if isinstance(self.cache, CudaCache):
            self._graphs = DecodeGraphs(
                self._decode,
                self.cache,
                self.bank,
                num_layers=len(decoder_layers(self.model)),
                max_rows=max_rows,
                max_context=self.max_context,
                record=record,
            )
            self._graphs.record_all()

    @torch.inference_mode()
    def step(self, batch: Batch, token_ids: Tensor | None = None) -> Logits:
        """Compute the batch's chunks; sequences do not advance. The logits are valid until the next step.

        token_ids: [rows], all tokens, if only the device knows them.
        """
        if batch.stale_blocks:
            self.cache.clear(batch.stale_blocks)
        if batch.copied_blocks:
            self.cache.copy(batch.copied_blocks)
        if self._graphs is not None and not batch.prefills:
            logits = self._graphs.run(batch.decodes, token_ids)
            if logits is not None:
                return Logits(logits, logits[:0])
        chunks = batch.chunks
        if token_ids is None:
            known = [np.asarray(c.sequence.token_ids[c.start : c.stop], np.int64) for c in chunks]
            token_ids = to_device(np.concatenate(known), self.device)
        positions = np.concatenate([np.arange(c.start, c.stop) for c in chunks])
        ends = np.cumsum([c.stop - c.start for c in chunks]) - 1
        sampling = ends[[c.samples for c in chunks]]
        # Packed row of a chunk's token, counted back from the chunk's last row.
        scoring = [
            np.arange(s.start, s.stop) - c.stop + 1 + end
            for c, end in zip(chunks, ends, strict=True)
            if (s := c.scores)
        ]
        rows = np.concatenate([sampling, *scoring])
        with self._editing(plan_edits(chunks, self.bank, self.device)):
            logits = self._forward(
                token_ids,
                to_device(positions, self.device),
                to_device(rows, self.device),
                self.cache.step(batch),
            )
        return Logits(logits[: len(sampling)], logits[len(sampling) :])

    def _decode(
        self, token_ids: Tensor, positions: Tensor, step: AttentionStep, edits: Mapping[int, DecodeEdits]
    ) -> Tensor:
        with self._editing(edits):
            return self._forward(token_ids, positions, None, step)

    @contextmanager
    def _editing(self, edits: Mapping[int, LayerEdits | DecodeEdits]) -> Iterator[None]:
        self._edits = edits
        try:
            yield
        finally:
            self._edits = {}

    def _forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor | None, step: AttentionStep) -> Tensor:
        """Return the logits of these rows; None is all rows. token_ids, positions: [rows]."""
        with attention_step(step):
            output = self.model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
            )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def _probe_shapes(self) -> list[LayerShape]:
        probe = ShapeProbe()
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._forward(one, one, one, probe)
        layers = len(decoder_layers(self.model))
        if sorted(probe.shapes) != list(range(layers)):
            raise UnsupportedModel(
                f"{type(self.model).__name__} has {layers} decoder layers, but attention ran at {sorted(probe.shapes)}"
            )
        return [probe.shapes[layer] for layer in range(layers)]

    def _edit(self, layer: int, hidden: Tensor) -> None:
        edits = self._edits.get(layer)
        if edits is not None:
            rows = hidden.view(-1, hidden.shape[-1])
            if self._edits_by_kernel and isinstance(edits, LayerEdits):
                edits.apply_on_cpu(rows, self.bank)
            else:
                edits.apply(rows, self.bank)


def _check_supported(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{name} does not use transformers' AttentionInterface")
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # Models with several kinds of layers have one set of parameters for each.
    kinds = {str(value.get("rope_type")) for value in [rope, *rope.values()] if isinstance(value, dict)}
    wrong = sorted(kinds & BATCH_DEPENDENT_ROPE)
    if wrong:
        raise UnsupportedModel(f"{name} has rope_type {wrong}, which depends on the longest sequence in a batch")
