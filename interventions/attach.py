"""Forward hooks that apply edits to any Hugging Face decoder: used by training, and the oracle for the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reftserve.interventions.edit import PlacedEdit
from reftserve.interventions.intervention_errors import ShapeError
from reftserve.interventions.positions import Positions
from reftserve.interventions.trainable import TrainableIntervention

Member = tuple[Positions, Callable[[Tensor], Tensor]]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order, found by structure: the one list of `num_hidden_layers` modules of one class.

    Raises ShapeError when the model has no such list, or several.
    """
    return list(_block_list(model))


def _block_list(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1
    ]
    # Lists inside a block (experts, say) may happen to have as many members.
    inner = {id(m) for found in lists for block in found for m in block.modules() if m is not found}
    outer = [found for found in lists if id(found) not in inner]
    if len(outer) != 1:
        raise ShapeError(f"{type(model).__name__} has {len(outer)} lists of {count} equal blocks; expected one")
    return outer[0]


@contextmanager
def attach(
    model: PreTrainedModel, edits: Sequence[PlacedEdit] | TrainableIntervention, n_prompt: int | Tensor
) -> Iterator[None]:
    """While inside, forward passes and `generate` of `model` are edited.

    edits: several at one place are summed in parallel, each reading the unedited hidden state.
    n_prompt: prompt length, or [batch] of them. Rows are padded on the right; column t of a pass has position
    t plus the length of the cache that the pass continues.
    Raises ShapeError when an edit does not fit the model.
    """
    layers = _block_list(model)
    # Not `model.base_model`: some architectures (OPT) call the module that runs the blocks past it.
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

    handles = [decoder.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        for layer, at_layer in members.items():
            handles.append(layers[layer].register_forward_hook(_hook(at_layer, n_prompt, lambda: past)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _members(
    edits: Sequence[PlacedEdit] | TrainableIntervention,
) -> list[tuple[int, Positions, Callable[[Tensor], Tensor]]]:
    """What each member adds to the rows that it touches."""
    if isinstance(edits, TrainableIntervention):
        return [(layer, positions, _family_delta(family)) for layer, positions, family in edits.placed()]
    return [(placed.layer, placed.positions, placed.edit.delta) for placed in edits]


def _family_delta(family: nn.Module) -> Callable[[Tensor], Tensor]:
    def delta(rows: Tensor) -> Tensor:
        edited: Tensor = family(rows.float())
        return edited - rows

    return delta


def _hook(members: list[Member], n_prompt: int | Tensor, past: Callable[[], int]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        edited = _edit(hidden, members, n_prompt, past())
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def _edit(hidden: Tensor, members: list[Member], n_prompt: int | Tensor, past: int) -> Tensor:
    """Edit hidden [batch, tokens, hidden] whose first column has position `past`; out of place."""
    batch, tokens, _ = hidden.shape
    lengths = [n_prompt] * batch if isinstance(n_prompt, int) else n_prompt.tolist()
    flat = hidden.flatten(0, 1)
    edited = flat
    for positions, delta in members:
        rows = [
            torch.from_numpy(positions.indices(length, past, past + tokens) - past) + row * tokens
            for row, length in enumerate(lengths)
        ]
        index = torch.cat(rows).to(hidden.device)
        if len(index):
            edited = edited.index_add(0, index, delta(flat[index]).to(hidden.dtype))
    return edited.view_as(hidden)
