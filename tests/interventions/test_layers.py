"""edit_layer() is the forward hook with which attach(), training and the engine edit a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reftserve.interventions import edit_layer


class Plain(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 1


class WithWeights(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return hidden + 1, "attention weights"


HIDDEN = torch.zeros(1, 3, 2)


def test_a_layer_outputs_the_returned_states_until_the_handle_is_removed() -> None:
    layer = Plain()
    with edit_layer(layer, lambda hidden: hidden * 5):
        assert torch.equal(layer(HIDDEN), HIDDEN + 5)
    assert torch.equal(layer(HIDDEN), HIDDEN + 1)


def test_the_other_elements_of_a_tuple_are_kept() -> None:
    layer = WithWeights()
    with edit_layer(layer, lambda hidden: hidden * 5):
        hidden, weights = layer(HIDDEN)
    assert torch.equal(hidden, HIDDEN + 5)
    assert weights == "attention weights"


def test_without_returned_states_the_layer_outputs_its_own_modified_tensor() -> None:
    seen: list[Tensor] = []

    def write(hidden: Tensor) -> None:
        seen.append(hidden)
        hidden[0, 1] = 7

    for layer in (Plain(), WithWeights()):
        with edit_layer(layer, write):
            output = layer(HIDDEN)
        hidden = output[0] if isinstance(output, tuple) else output
        assert hidden is seen[-1]
        assert hidden[0].tolist() == [[1, 1], [7, 7], [1, 1]]
