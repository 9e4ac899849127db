"""A model's decoder layers, found by structure. attach(), training and the engine all edit through `edit_layer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from reftserve.interventions.intervention_errors import ShapeError

# Edits a layer's hidden states, [batch, tokens, hidden]. None: nothing is edited, or the function wrote in place.
HiddenEdit = Callable[[Tensor], Tensor | None]


def edit_layer(layer: nn.Module, edit: HiddenEdit) -> RemovableHandle:
    """Pass a layer's hidden states, also first in an output tuple, through `edit` until the handle is removed."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        edited = edit(output[0] if is_tuple else output)
        if edited is None:
            return None
        return (edited, *output[1:]) if is_tuple else edited

    return layer.register_forward_hook(hook)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder blocks. Raises ShapeError unless exactly one list has `num_hidden_layers` equal modules."""
    return list(block_list(model))


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """Return the module that holds the decoder blocks; see `decoder_layers`."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1
    ]
    # A list inside a block (of experts, say) can have the same length.
    inner = {id(m) for found in lists for block in found for m in block.modules() if m is not found}
    outer = [found for found in lists if id(found) not in inner]
    if len(outer) != 1:
        raise ShapeError(f"{type(model).__name__} has {len(outer)} lists of {count} equal blocks; expected one")
    return outer[0]
