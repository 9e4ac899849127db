"""Edits on any Hugging Face decoder: the simplest form, and the oracle for the engine and for training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reftserve.interventions.edit import PlacedEdit
from reftserve.interventions.intervention_errors import ShapeError
from reftserve.interventions.layers import HiddenEdit, block_list, edit_layer
from reftserve.interventions.positions import Positions
from reftserve.interventions.trainable import TrainableIntervention

Member = tuple[Positions, Callable[[Tensor], Tensor]]


@contextmanager
def attach(
    model: PreTrainedModel, edits: Sequence[PlacedEdit] | TrainableIntervention, n_prompt: int | Tensor
) -> Iterator[None]:
    """Edit forward passes and `generate` of `model` in the context. Raises ShapeError if an edit does not fit.

    Edits of one layer and position add up, each computed from the unedited hidden state. n_prompt: prompt length, or
    one for each row, [batch], padded on the right. A pass begins at the length of the cache that it continues.
    """
    layers = block_list(model)
    # Not `model.base_model`: OPT calls the decoder inside it directly, so hooks on it do not run.
    decoder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    members: defaultdict[int, list[Member]] = defaultdict(list)
    for layer, positions, delta in _members(edits):
        if layer >= len(layers):
            raise ShapeError(f"edit at layer {layer}; the model has layers 0 to {len(layers) - 1}")
        members[layer].append((positions, delta))
    past = 0

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal past
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())

    with ExitStack() as stack:
        stack.enter_context(decoder.register_forward_pre_hook(before, with_kwargs=True))
        for layer, at_layer in members.items():
            stack.enter_context(edit_layer(layers[layer], _edit(at_layer, n_prompt, lambda: past)))
        yield


def _members(
    edits: Sequence[PlacedEdit] | TrainableIntervention,
) -> list[tuple[int, Positions, Callable[[Tensor], Tensor]]]:
    if isinstance(edits, TrainableIntervention):
        return [(layer, positions, _family_delta(family)) for layer, positions, family in edits.placed()]
    return [(placed.layer, placed.positions, placed.edit.delta) for placed in edits]


def _family_delta(family: nn.Module) -> Callable[[Tensor], Tensor]:
    def delta(rows: Tensor) -> Tensor:
        edited: Tensor = family(rows.float())
        return edited - rows

    return delta


def _edit(members: list[Member], n_prompt: int | Tensor, past: Callable[[], int]) -> HiddenEdit:
    def edit(hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        start = past()
        lengths = [n_prompt] * batch if isinstance(n_prompt, int) else n_prompt.tolist()
        flat = hidden.flatten(0, 1)
        edited = flat
        for positions, delta in members:
            rows = [
                torch.from_numpy(positions.indices(length, start, start + tokens) - start) + row * tokens
                for row, length in enumerate(lengths)
            ]
            index = torch.cat(rows).to(hidden.device)
            if len(index):
                edited = edited.index_add(0, index, delta(flat[index]).to(hidden.dtype))
        return edited.view_as(hidden)

    return edit
