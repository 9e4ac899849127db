"""The backward pass of the CPU kernels against autograd through plain torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import plain_attention
from plain_rotation import HEADS, plain_rotation
from torch import Tensor

from reftserve.server.base.fused import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("kernels")

Function = Callable[..., Tensor]


def randoms(seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def assert_same_both_ways(kernel: Function, plain: Function, inputs: Sequence[Tensor]) -> None:
    results = []
    for function, dtype in ((kernel, torch.float32), (plain, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        upstream = randoms(99, out.shape)[0].to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for found, expected in zip(*results, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found.double(), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("size", [1, 15, 16, 100])
def test_the_gradient_of_a_norm_equals_torchs(size: int) -> None:
    x, weight = randoms(size, (3, 4, size), (size,))

    def plain(x: Tensor) -> Tensor:
        return x * weight.double() * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    assert_same_both_ways(lambda x: torch.ops.reftserve.rms_norm(x, weight, 1e-5), plain, [5 * x])


@pytest.mark.parametrize("size", [1, 15, 16, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_of_a_gated_activation_equals_torchs(activation: int, size: int) -> None:
    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    (gate_up,) = randoms(size, (3, 4, 2 * size))
    assert_same_both_ways(lambda x: torch.ops.reftserve.gated_activation(x, activation), plain, [4 * gate_up])


@settings(max_examples=50, deadline=None)
@given(**HEADS)
def test_the_gradient_of_rotary_embeddings_equals_torchs_for_any_cosines_and_sines(
    rows: int, heads: tuple[int, int], dim: int, rest: int, seed: int
) -> None:
    size = dim + rest
    query, key, cosines, sines = randoms(seed, *((rows, n * size) for n in heads), (rows, dim), (rows, dim))

    def kernel(query: Tensor, key: Tensor) -> Tensor:
        return torch.cat(torch.ops.reftserve.rotated(query, key, cosines, sines, size), dim=-1)

    def plain(query: Tensor, key: Tensor) -> Tensor:
        return torch.cat([plain_rotation(x, cosines.double(), sines.double(), size) for x in (query, key)], dim=-1)

    assert_same_both_ways(kernel, plain, [query, key])


@settings(max_examples=100, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (5, 1)]),
    dim=st.sampled_from([7, 8, 20, 64]),
    window=st.sampled_from([None, 1, 5, 30]),
    seed=st.integers(0, 100),
)
def test_the_gradient_of_span_attention_over_kept_prefixes_equals_torchs(
    spans: list[tuple[int, int]], heads: tuple[int, int], dim: int, window: int | None, seed: int
) -> None:
    """spans: for each span, the tokens before it and its own."""
    query_heads, kv_heads = heads
    starts, widths = zip(*spans, strict=True)
    before = randoms(seed + 1, *((2, kv_heads, start, dim) for start in starts))
    # As in a layer: row by row, as parts of one product.
    sizes = [n * dim for n in (query_heads, kv_heads, kv_heads)]
    product = randoms(seed, (sum(widths), sum(sizes)))[0]
    inputs = [part.unflatten(1, (-1, dim)).transpose(0, 1) for part in product.split(sizes, dim=1)]

    def kernel(*new: Tensor) -> Tensor:
        return torch.ops.reftserve.span_attention(*new, before, list(widths), dim**-0.5, window or 0)

    def plain(*new: Tensor) -> Tensor:
        parts = zip(before, starts, *(tensor.split(list(widths), dim=1) for tensor in new), strict=True)
        return torch.cat(
            [
                plain_attention(
                    query,
                    torch.cat([kept[0].double(), key], dim=1),
                    torch.cat([kept[1].double(), value], dim=1),
                    start,
                    window,
                )
                for kept, start, query, key, value in parts
            ]
        )

    assert_same_both_ways(kernel, plain, inputs)


def test_a_span_and_its_gradients_are_independent_of_the_other_spans() -> None:
    before = randoms(1, (2, 2, 30, 16), (2, 2, 41, 16))
    query, key, value = randoms(2, (4, 25, 16), (2, 25, 16), (2, 25, 16))

    def both(widths: list[int], kept: list[Tensor], first: int) -> list[Tensor]:
        new = [tensor[:, first:].clone().requires_grad_() for tensor in (query, key, value)]
        out = torch.ops.reftserve.span_attention(*new, kept, widths, 0.25, 0)
        return [out[-20:].detach(), *(g[:, -20:] for g in torch.autograd.grad(out.square().sum(), new))]

    together, alone = both([5, 20], before, 0), both([20], before[1:], 5)
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_attention_accepts_any_strides_of_inputs_and_gradients() -> None:
    before, new = randoms(1, (2, 2, 30, 16)), randoms(2, (4, 5, 16), (2, 5, 16), (2, 5, 16))
    found = []
    for form in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        leaves = [form(tensor).requires_grad_() for tensor in new]
        out = torch.ops.reftserve.span_attention(*leaves, before, [5], 0.25, 0)
        found += [torch.autograd.grad(out, leaves, form(torch.ones(out.shape)), retain_graph=True)]
        found += [torch.autograd.grad(out.sum(), leaves)]  # all strides of its gradient are 0
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("sizes", "before", "rows", "message"),
    [
        ([(4, 5, 16), (2, 5, 16), (2, 5, 8)], (2, 2, 9, 16), [5], "as many rows and numbers"),
        ([(3, 5, 16), (2, 5, 16), (2, 5, 16)], (2, 2, 9, 16), [5], "cannot be shared"),
        ([(4, 5, 16), (2, 5, 16), (2, 5, 16)], (2, 1, 9, 16), [5], "what lies before"),
        ([(4, 5, 16), (2, 5, 16), (2, 5, 16)], (2, 2, 9, 8), [5], "what lies before"),
        ([(4, 5, 16), (2, 5, 16), (2, 5, 16)], (2, 2, 9, 16), [4], "spans of 4 rows are given 5"),
        ([(4, 5, 16), (2, 5, 16), (2, 5, 16)], (2, 2, 9, 16), [4, 1], "2 spans are given what lies before 1"),
    ],
)
def test_attention_refuses_tensors_of_wrong_shape(
    sizes: list[tuple[int, ...]], before: tuple[int, ...], rows: list[int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.reftserve.span_attention(*randoms(0, *sizes), randoms(1, before), rows, 0.25, 0)


def test_a_tensor_that_needs_a_gradient_is_not_rotated_in_place() -> None:
    query, key, cosines, sines = randoms(0, *[(3, 8)] * 4)
    with pytest.raises(RuntimeError, match="rotated"):
        torch.ops.reftserve.rotate(query.requires_grad_(), key, cosines, sines, 8)
