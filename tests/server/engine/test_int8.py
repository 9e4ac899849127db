"""Linear layers in int8: a function close to the plain one, with each row independent of its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_oracle import RecordingRunner, request, run_until_done
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_linear import linear
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from reftserve.server.base.int8 import Int8Linear, SiblingLinear, found_siblings, round_linears
from reftserve.server.base.model_errors import UnsupportedModel
from reftserve.server.base.panels import PanelLinear
from reftserve.server.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("kernels")


def relative_error(form: nn.Module, plain: nn.Linear, x: torch.Tensor) -> float:
    expected = plain(x)
    return float((form(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_close_to_float32_and_closer_when_precise(bias: bool) -> None:
    plain = linear(bias=bias)
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    x[..., 7] *= 30  # an outlier dominates the scale
    rough = relative_error(Int8Linear([plain]), plain, x)
    fine = relative_error(Int8Linear([plain], precise=True), plain, x)
    assert fine < 0.01 < rough < 0.1


def test_int8_of_a_packed_layer_is_bitwise_equal_to_that_of_the_plain_layer() -> None:
    plain = linear()
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(Int8Linear([PanelLinear([plain])])(x), Int8Linear([plain])(x))


@settings(max_examples=100, deadline=None)
@given(mates=st.integers(0, 9), scale=st.floats(1e-3, 1e6), precise=st.booleans())
def test_an_int8_row_is_bitwise_independent_of_the_other_rows(mates: int, scale: float, precise: bool) -> None:
    plain = linear()
    form = Int8Linear([plain], precise=precise)
    generator = torch.Generator().manual_seed(mates)
    mine, others = torch.randn(1, 48, generator=generator), torch.randn(mates, 48, generator=generator) * scale
    assert torch.equal(form(torch.cat([others, mine]))[-1], form(mine)[0])


def test_int8_of_zeros_is_zero_and_infinity_stays_visible() -> None:
    form = Int8Linear([linear(bias=False)])
    assert torch.equal(form(torch.zeros(2, 48)), torch.zeros(2, 20))
    x = torch.ones(2, 48)
    x[0, 0] = torch.inf
    assert not form(x)[0].isfinite().any()
    assert form(x)[1].isfinite().all()


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.other = linear(48, 20), linear(48, 7), linear(48, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.left(x), self.right(x), self.other(x + 1)


def test_int8_layers_that_read_one_tensor_are_fused_with_bitwise_equal_results() -> None:
    fork, x = Fork(), torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    expected = [Int8Linear([layer])(x) for layer in (fork.left, fork.right)]
    with found_siblings(fork) as groups:
        fork(x)
    assert groups == [[fork.left, fork.right]]
    round_linears(fork, groups)
    assert [type(layer) for layer in fork.children()] == [SiblingLinear, SiblingLinear, Int8Linear]
    for _ in range(2):
        found = fork(x)
        assert all(torch.equal(f, e) for f, e in zip(found[:2], expected, strict=True))


def test_int8_takes_float32_on_the_cpu_only() -> None:
    model = tiny_llama().to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match="float32"):
        RecordingRunner(model, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14, int8=True)  # type: ignore[arg-type]


def test_an_int8_engine_serves_mixtures_as_alone(tiny_llama_folder: Path, artifacts: list[Path]) -> None:
    def engine() -> Engine:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
        runner = RecordingRunner(
            model.requires_grad_(False), kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 16, int8=True
        )  # type: ignore[arg-type]
        return Engine(runner, max_batch_tokens=16, max_sequences=8)

    submits = [
        request(str(i), list(range(5 + i, 20 + 3 * i)), uses=[(artifacts[i % 6], 1.0)], max_tokens=1) for i in range(8)
    ]
    mixed = engine()
    for submit in submits:
        mixed.submit(submit)
    run_until_done(mixed)
    for submit in submits:
        alone = engine()
        alone.submit(submit)
        run_until_done(alone)
        key = (submit.request_id, len(submit.prompt_ids))
        expected, found = alone.runner.logits[key], mixed.runner.logits[key]  # type: ignore[attr-defined]
        # Sums of other lengths differ in the last bit, which rounding sometimes turns into one int8 step.
        assert float((found - expected).norm() / expected.norm()) < 0.02
        alone.close()
    mixed.close()
