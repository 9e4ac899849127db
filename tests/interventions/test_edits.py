"""Edits: the canonical form, its composition, and the lowering of every family to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reftserve.interventions import (
    FAMILIES,
    Activation,
    DtypeError,
    InterventionConfig,
    LowRankEdit,
    NonFiniteError,
    PositionsError,
    ShapeError,
    TrainableIntervention,
    compose,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
seeds = st.integers(0, 2**31 - 1)


def edit(rank: int, hidden: int, seed: int, act: int | None = None) -> LowRankEdit:
    draw = torch.Generator().manual_seed(seed)
    return LowRankEdit(
        A=torch.randn(rank, hidden, generator=draw),
        b=torch.randn(rank, generator=draw),
        U=torch.randn(rank, hidden, generator=draw),
        act=torch.randint(0, len(Activation), (rank,), generator=draw, dtype=torch.int8)
        if act is None
        else torch.full((rank,), act, dtype=torch.int8),
        scale=torch.randn(rank, generator=draw),
    )


def rows(count: int, hidden: int, seed: int) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


@given(rank=st.integers(1, 8), hidden=st.integers(1, 24), count=st.integers(0, 6), seed=seeds)
def test_an_edit_is_its_formula_column_by_column(rank: int, hidden: int, count: int, seed: int) -> None:
    one, h = edit(rank, hidden, seed), rows(count, hidden, seed + 1)
    functions = [lambda y: y, torch.relu, torch.nn.functional.gelu, torch.tanh, torch.sigmoid, torch.nn.functional.silu]
    expected = h.clone()
    for i in range(rank):
        expected += one.scale[i] * functions[int(one.act[i])](h @ one.A[i] + one.b[i])[:, None] * one.U[i]
    torch.testing.assert_close(one.apply(h), expected, atol=1e-4, rtol=1e-4)


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=seeds)
def test_a_composition_is_the_parallel_sum_of_its_members(ranks: list[int], seed: int) -> None:
    members = [edit(rank, 8, seed + i) for i, rank in enumerate(ranks)]
    h = rows(5, 8, seed)
    together = compose(members)
    assert together.rank == sum(ranks)
    torch.testing.assert_close(together.apply(h), h + sum(member.delta(h) for member in members), **CLOSE)


@given(scale=st.floats(-10, 10), seed=seeds)
def test_scale_multiplies_the_delta_and_zero_adds_nothing(scale: float, seed: int) -> None:
    one, h = edit(3, 8, seed), rows(4, 8, seed)
    torch.testing.assert_close(one.scaled(scale).delta(h), scale * one.delta(h), atol=1e-4, rtol=1e-4)
    assert torch.equal(one.scaled(0).apply(h), h)


def test_an_edit_computes_in_its_dtype_and_returns_that_of_the_hidden_states() -> None:
    one, h = edit(2, 8, 0), rows(3, 8, 1).bfloat16()
    assert one.apply(h).dtype == torch.bfloat16
    assert torch.equal(one.apply(h), one.apply(h.float()).bfloat16())


def test_an_invalid_edit_is_refused_with_the_expected_form() -> None:
    good = edit(2, 8, 0)
    fields = {"A": good.A, "b": good.b, "U": good.U, "act": good.act, "scale": good.scale}
    for name, wrong, error, words in [
        ("A", torch.zeros(2, 8, 1), ShapeError, "A has shape"),
        ("b", torch.zeros(3), ShapeError, r"b has shape \[3\]; expected \[2\]"),
        ("U", torch.zeros(2, 9), ShapeError, r"U has shape \[2, 9\]; expected \[2, 8\]"),
        ("act", torch.zeros(2), DtypeError, "int8"),
        ("act", torch.full((2,), 77, dtype=torch.int8), DtypeError, "77"),
        ("A", torch.zeros(2, 8, dtype=torch.int64), DtypeError, "int64"),
        ("U", torch.zeros(2, 8, dtype=torch.float64), DtypeError, "float64"),
        ("scale", torch.tensor([1.0, float("nan")]), NonFiniteError, "scale"),
        ("b", torch.tensor([float("inf"), 0.0]), NonFiniteError, "b contains"),
    ]:
        with pytest.raises(error, match=words):
            LowRankEdit(**{**fields, name: wrong})
    with pytest.raises(ShapeError, match="size 9"):
        good.apply(torch.zeros(1, 9))
    with pytest.raises(ShapeError, match="cannot be composed"):
        compose([good, edit(2, 9, 0)])


def test_content_hashes_are_equal_exactly_for_equal_edits() -> None:
    one = edit(2, 8, 0)
    assert one.content_hash == edit(2, 8, 0).content_hash
    others = [edit(2, 8, 1), one.scaled(2), edit(2, 8, 0, act=1), compose([one, one])]
    assert len({one.content_hash, *(other.content_hash for other in others)}) == 5


@pytest.mark.parametrize("name", FAMILIES)
@given(rank=st.integers(1, 4), seed=seeds)
def test_every_family_lowers_to_an_edit_with_the_same_effect(name: str, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = FAMILIES[name](8, rank, dropout=0.3).eval()
    for name_, parameter in module.named_parameters():
        if "parametrizations" not in name_:  # torch keeps signs there, so nothing may be added
            parameter.data += 0.3 * torch.randn_like(parameter)
    h = rows(5, 8, seed)
    torch.testing.assert_close(module.lower().apply(h), module(h), **CLOSE)
    assert not any(t.requires_grad for t in (module.lower().A, module.lower().U, module.lower().b))


@pytest.mark.parametrize("name", ["loreft", "direft", "consreft", "lobireft"])
def test_the_rows_of_R_are_orthonormal_after_optimizer_steps(name: str) -> None:
    module = FAMILIES[name](16, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
    R = module.lower().U
    torch.testing.assert_close(R @ R.T, torch.eye(4), **CLOSE)


def test_dropout_acts_in_training_only() -> None:
    module = FAMILIES["loreft"](16, 2, dropout=0.5)
    h = rows(20, 16, 0)
    assert (module(h) == 0).any()
    assert not (module.eval()(h) == 0).any()


def test_untied_weights_are_two_edits_and_tied_weights_are_one() -> None:
    def places(positions: str, *, tied: bool) -> list[tuple[int, str]]:
        config = InterventionConfig("loreft", (1, 3), positions, rank=2, tied=tied)
        return [(placed.layer, str(placed.positions)) for placed in TrainableIntervention(config, 8).lower()]

    assert places("f3+l2", tied=True) == [(1, "f3+l2"), (3, "f3+l2")]
    assert places("f3+l2", tied=False) == [(1, "f3+l0"), (1, "f0+l2"), (3, "f3+l0"), (3, "f0+l2")]
    assert places("prompt", tied=False) == places("prompt", tied=True)


def test_the_seed_alone_determines_the_initial_weights() -> None:
    config = InterventionConfig("loreft", (0, 1), "l1", rank=2)
    hashes = [[p.edit.content_hash for p in TrainableIntervention(config, 8, seed=seed).lower()] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(ValueError, match="expected one of loreft"):
        TrainableIntervention(InterventionConfig("lora", (0,), "l1", 2), 8)
    with pytest.raises(PositionsError):
        TrainableIntervention(InterventionConfig("loreft", (0,), "x9", 2), 8)
