"""Linear layers in panels: the same function and gradient, with each row independent of its batch."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_linear import linear
from torch import nn

from reftserve.server.base.panels import PanelEmbedding, PanelLinear, takes_kernels, use_panels

sizes = st.integers(1, 110)


pytestmark = pytest.mark.usefixtures("kernels")


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 300), n_in=sizes, n_out=sizes, bias=st.booleans())
def test_a_packed_layer_gives_the_same_result(rows: int, n_in: int, n_out: int, bias: bool) -> None:
    plain = linear(n_in, n_out, bias=bias)
    x = random(2, rows, n_in)
    torch.testing.assert_close(PanelLinear([plain])(x), plain(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    n_in=sizes,
    n_outs=st.lists(st.one_of(sizes, st.integers(700, 900)), min_size=1, max_size=3),
)
def test_the_gradient_is_computed_from_the_same_panels(rows: int, n_in: int, n_outs: list[int]) -> None:
    layers, x = [linear(n_in, n) for n in n_outs], random(rows, n_in).requires_grad_()
    upstream = random(rows, sum(n_outs), seed=3)
    (expected,) = torch.autograd.grad(torch.cat([layer(x) for layer in layers], dim=-1), x, upstream)
    (found,) = torch.autograd.grad(PanelLinear(layers)(x), x, upstream)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # sums of 900 numbers in another order


@settings(max_examples=60, deadline=None)
@given(mates=st.integers(0, 200), place=st.integers(0, 200))
def test_a_row_and_its_gradient_are_bitwise_independent_of_its_position(mates: int, place: int) -> None:
    form, place = PanelLinear([linear()]), min(place, mates)

    def both(x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        y = form(x)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    mine, mine_back = random(1, 48, seed=mates), random(1, 20, seed=mates)
    others, others_back = random(mates, 48), random(mates, 20)
    alone = both(mine, mine_back)
    together = both(
        torch.cat([others[:place], mine, others[place:]]),
        torch.cat([others_back[:place], mine_back, others_back[place:]]),
    )
    assert all(torch.equal(one[place], other[0]) for one, other in zip(together, alone, strict=True))


@settings(max_examples=60, deadline=None)
@given(outs=st.lists(sizes, min_size=2, max_size=3), biases=st.lists(st.booleans(), min_size=3, max_size=3))
def test_layers_that_read_one_tensor_are_adjacent_and_compute_as_alone(outs: list[int], biases: list[bool]) -> None:
    layers, x = [linear(48, n, bias=bias) for n, bias in zip(outs, biases, strict=False)], random(3, 48)
    alone = [PanelLinear([layer]) for layer in layers]
    expected = torch.cat([layer(x) for layer in alone], dim=-1)
    for form in (PanelLinear(layers), PanelLinear(alone)):
        assert torch.equal(form(x), expected)


@pytest.mark.parametrize("n_out", [20, 48, 110])
def test_packing_is_lossless(n_out: int) -> None:
    plain = linear(7, n_out)
    assert torch.equal(PanelLinear([plain]).unpacked(), plain.weight)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_model_gives_the_same_result_and_holds_no_weight_twice(name: str) -> None:
    plain = tiny_model(name).requires_grad_(False)
    packed, ids = copy.deepcopy(plain), torch.randint(100, (2, 9))
    use_panels(packed)
    torch.testing.assert_close(packed(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    head, embedding = packed.get_output_embeddings(), packed.get_input_embeddings()
    is_tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    # Gemma scales its embedding, so that module keeps its own weights.
    assert (type(embedding) is PanelEmbedding) == (is_tied and name != "gemma3")
    assert (embedding.weight is head.weight) == (type(embedding) is PanelEmbedding)


def test_an_embedding_read_from_panels_is_bitwise_equal() -> None:
    plain = tiny_model("gpt2").requires_grad_(False)
    packed, ids = copy.deepcopy(plain), torch.arange(100).view(4, 25)
    use_panels(packed)
    assert torch.equal(packed.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))


def test_kernels_compute_float32_only() -> None:
    assert takes_kernels(tiny_model("llama"))
    assert not takes_kernels(tiny_model("llama").to(torch.bfloat16))
