"""The recipe: everything left open is decided, everything decided is kept."""

from __future__ import annotations

import pytest

from reftserve.client.schemas import Method, SupervisedHyperparameters
from reftserve.interventions import BaseFingerprint
from reftserve.server.errors import InvalidRequest
from reftserve.server.training.recipe import LEARNING_RATE, make_plan

BASE = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=64, num_layers=30, vocab_size=100)


def test_nothing_asked_gives_one_middle_layer_and_suffix_only_positions() -> None:
    plan = make_plan(None, None, BASE, examples=150, max_context=2048)
    assert (plan.family, plan.layers, plan.positions, plan.rank) == ("loreft", [15], "l1", 4)
    assert plan.n_epochs >= 2
    assert plan.batch_size == 8


@pytest.mark.parametrize("examples", [10, 50, 1000, 100_000])
def test_small_data_gets_more_epochs_than_large(examples: int) -> None:
    plan = make_plan(None, None, BASE, examples=examples, max_context=2048)
    steps = plan.n_epochs * plan.steps_per_epoch(round(examples * 0.8))
    assert 2 <= plan.n_epochs <= 20
    assert steps >= 40


def test_openais_knobs_scale_the_recipe() -> None:
    knobs = SupervisedHyperparameters(n_epochs=3, batch_size=2, learning_rate_multiplier=0.5)
    for method, legacy in (
        (None, knobs),
        (Method.model_validate({"type": "supervised", "supervised": {"hyperparameters": knobs.model_dump()}}), None),
    ):
        plan = make_plan(method, legacy, BASE, examples=100, max_context=2048)
        assert (plan.n_epochs, plan.batch_size, plan.learning_rate) == (3, 2, LEARNING_RATE / 2)


def test_what_is_asked_is_kept() -> None:
    reft = {
        "family": "nodireft",
        "layers": "all",
        "positions": "f7+l7",
        "rank": 8,
        "dropout": 0.05,
        "tied": False,
        "hyperparameters": {"n_epochs": 1, "batch_size": 16, "weight_decay": 0.06, "warmup_ratio": 0.0},
    }
    plan = make_plan(Method.model_validate({"type": "reft", "reft": reft}), None, BASE, examples=100, max_context=512)
    assert plan.layers == list(range(30))
    assert (plan.family, plan.positions, plan.rank, plan.tied) == ("nodireft", "f7+l7", 8, False)
    assert (plan.dropout, plan.weight_decay, plan.warmup_ratio, plan.max_length) == (0.05, 0.06, 0.0, 512)


def test_a_method_of_one_kind_with_the_fields_of_the_other_is_refused() -> None:
    for method in ({"type": "supervised", "reft": {}}, {"type": "reft", "supervised": {}}):
        with pytest.raises(InvalidRequest, match="does not go with"):
            make_plan(Method.model_validate(method), None, BASE, examples=100, max_context=512)


def swept(sweep: dict[str, object], seed: int = 0) -> list[dict[str, object]]:
    """What the trials of a sweep differ in."""
    method = Method.model_validate({"type": "reft", "reft": {"sweep": sweep}})
    plan = make_plan(method, None, BASE, examples=100, max_context=512, seed=seed)
    return [variant.model_dump(exclude_none=True) for variant in plan.sweep]


def test_a_sweep_tries_every_combination_of_its_values_while_there_is_room() -> None:
    trials = swept({"layers": [[3], "all"], "rank": [1, 2], "trials": 8})
    assert len(trials) == 4
    assert {(len(t["layers"]), t["rank"]) for t in trials} == {(1, 1), (1, 2), (30, 1), (30, 2)}  # type: ignore[arg-type]


def test_of_more_combinations_a_sweep_tries_random_ones_that_the_seed_decides() -> None:
    sweep = {"rank": list(range(1, 33)), "positions": ["l1", "f1+l1"], "trials": 5}
    trials = swept(sweep)
    assert len({tuple(sorted(t.items())) for t in trials}) == 5
    assert trials == swept(sweep) != swept(sweep, seed=1)


def test_each_trial_draws_its_own_number_from_a_range() -> None:
    rates = [t["learning_rate"] for t in swept({"learning_rate": {"low": 1e-4, "high": 1e-2}, "trials": 16})]
    assert len(set(rates)) == 16
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sweep", "param"),
    [
        ({}, "method.reft.sweep"),
        ({"rank": [4, 65]}, "method.reft.sweep.rank"),
        ({"rank": [0]}, "method.reft.sweep.rank"),
        ({"positions": ["l1", "m1"]}, "method.reft.sweep.positions"),
        ({"layers": [[30]]}, "method.reft.sweep.layers"),
        ({"learning_rate": [0.0]}, "method.reft.sweep.learning_rate"),
        ({"dropout": [0.0, 1.0]}, "method.reft.sweep.dropout"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_by_its_field(sweep: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        swept(sweep)
    assert caught.value.param == param
