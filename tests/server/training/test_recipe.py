"""The recipe makes every open decision by the data's size, and keeps every given one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reftserve.client.schemas import FineTuningJobCreate, Method, SupervisedHyperparameters
from reftserve.interventions import BaseFingerprint
from reftserve.server.errors import InvalidRequest
from reftserve.server.training.candidates import DataSize
from reftserve.server.training.plan import Plan
from reftserve.server.training.recipe import make_plan, requested_method, token_limit

BASE = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=64, num_layers=30, vocab_size=100)
LABELS = DataSize(examples=160, prompt_tokens=70, completion_tokens=2)
TEXTS = DataSize(examples=5000, prompt_tokens=200, completion_tokens=150)


def planned(method: dict[str, Any] | None, size: DataSize = LABELS, base: BaseFingerprint = BASE) -> Plan:
    parsed = None if method is None else Method.model_validate(method)
    return make_plan(parsed, base, size, max_length=512)


def reft(**fields: Any) -> dict[str, Any]:
    return {"type": "reft", "reft": fields}


def test_without_a_method_several_candidates_are_tried_and_the_first_is_suffix_only_on_few_layers() -> None:
    plan = planned(None)
    first = plan.trials[0]
    assert (first.family, first.layers, first.positions, first.rank) == ("loreft", [6, 12, 17, 23], "l1", 8)
    assert plan.batch_size == 8
    assert 4 <= len(plan.trials) <= 8
    assert len({trial.model_dump_json() for trial in plan.trials}) == len(plan.trials)
    assert not first.edits_prefix


@pytest.mark.parametrize(
    "method",
    [
        reft(),
        {"type": "reft"},
        reft(hyperparameters="auto"),
        {"type": "supervised"},
        {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
    ],
)
def test_auto_in_any_spelling_means_the_same_as_no_method(method: dict[str, Any]) -> None:
    assert planned(method) == planned(None)


def test_given_hyperparameters_make_one_run_of_the_first_candidate() -> None:
    plan = planned(reft(hyperparameters={"n_epochs": 3}))
    assert plan == planned(None).trials[0].model_copy(update={"n_epochs": 3})


def test_prefix_edits_are_tried_only_on_small_data_and_never_first() -> None:
    small = planned(None, DataSize(examples=50, prompt_tokens=40, completion_tokens=2))
    assert "prompt" in {trial.positions for trial in small.trials}
    assert max(trial.rank for trial in small.trials) == next(t.rank for t in small.trials if t.positions == "prompt")
    assert not small.trials[0].edits_prefix
    assert not any(trial.edits_prefix for trial in planned(None, TEXTS).trials)


@pytest.mark.parametrize(("field", "value"), [("layers", [3, 9]), ("positions", "l2"), ("rank", 7)])
def test_every_candidate_keeps_the_given_field(field: str, value: object) -> None:
    plan = planned(reft(**{field: value}))
    assert len(plan.trials) > 1
    assert all(getattr(trial, field) == value for trial in plan.trials)


def test_with_a_given_shape_candidates_differ_in_learning_rate() -> None:
    plan = planned(reft(layers="all", positions="l1", rank=8, dropout=0.1, family="noreft", hyperparameters="auto"))
    rates = [trial.learning_rate for trial in plan.trials]
    assert len(set(rates)) == len(rates) > 1
    assert {(t.family, tuple(t.layers), t.positions, t.rank, t.dropout) for t in plan.trials} == {
        ("noreft", tuple(range(30)), "l1", 8, 0.1)
    }


def test_given_prefix_positions_leave_large_data_one_candidate() -> None:
    plan = planned(reft(positions="f7+l7"), TEXTS)
    assert (plan.positions, len(plan.trials)) == ("f7+l7", 1)


sizes = st.builds(
    DataSize,
    examples=st.integers(1, 100_000),
    prompt_tokens=st.integers(1, 2000),
    completion_tokens=st.integers(1, 2000),
)


@given(size=sizes, hidden_size=st.integers(1, 64), num_layers=st.integers(1, 40))
def test_every_candidate_fits_the_base_and_suffix_only_is_always_among_them(
    size: DataSize, hidden_size: int, num_layers: int
) -> None:
    base = BASE.model_copy(update={"hidden_size": hidden_size, "num_layers": num_layers})
    for trial in planned(None, size, base).trials:
        assert 1 <= trial.rank <= hidden_size
        assert trial.layers == sorted(set(trial.layers))
        assert all(0 <= layer < num_layers for layer in trial.layers)
        assert 1 <= trial.n_epochs <= 20
        assert trial.batch_size >= 1


@given(size=sizes, factor=st.integers(2, 10))
def test_more_data_or_longer_answers_never_get_more_epochs(size: DataSize, factor: int) -> None:
    epochs = planned(None, size).n_epochs
    more = DataSize(size.examples * factor, size.prompt_tokens, size.completion_tokens)
    longer = DataSize(size.examples, size.prompt_tokens, size.completion_tokens * factor)
    assert planned(None, longer).n_epochs <= epochs
    if size.examples >= 64:  # smaller data has smaller batches
        assert planned(None, more).n_epochs <= epochs


def test_openais_knobs_scale_the_recipe() -> None:
    def plan(factor: float, *, as_method: bool) -> Plan:
        knobs = SupervisedHyperparameters(n_epochs=3, batch_size=2, learning_rate_multiplier=factor)
        method = {"type": "supervised", "supervised": {"hyperparameters": knobs.model_dump()}}
        asked = {"method": method} if as_method else {"hyperparameters": knobs.model_dump()}
        request = FineTuningJobCreate.model_validate({"model": "m", "training_file": "file-1", **asked})
        return make_plan(requested_method(request), BASE, LABELS, max_length=512)

    halved = plan(0.5, as_method=True)
    assert halved == plan(0.5, as_method=False)
    assert (halved.n_epochs, halved.batch_size) == (3, 2)
    for trial, plain in zip(halved.trials, plan(1.0, as_method=True).trials, strict=True):
        assert trial.learning_rate == plain.learning_rate / 2


def test_the_plan_keeps_every_given_field() -> None:
    plan = planned(
        reft(
            family="nodireft",
            layers="all",
            positions="f7+l7",
            rank=8,
            dropout=0.05,
            tied=False,
            hyperparameters={"n_epochs": 1, "batch_size": 16, "weight_decay": 0.06, "warmup_ratio": 0.0},
        )
    )
    assert plan.layers == list(range(30))
    assert (plan.family, plan.positions, plan.rank, plan.tied, plan.sweep) == ("nodireft", "f7+l7", 8, False, [])
    assert (plan.dropout, plan.weight_decay, plan.warmup_ratio, plan.max_length) == (0.05, 0.06, 0.0, 512)


def test_the_token_limit_is_the_requested_length_up_to_the_context() -> None:
    def asked(tokens: int) -> Method:
        return Method.model_validate(reft(hyperparameters={"max_length": tokens}))

    assert (token_limit(None, 2048), token_limit(None, 512), token_limit(asked(2000), 2048)) == (1024, 512, 2000)
    with pytest.raises(InvalidRequest, match="2048") as caught:
        token_limit(asked(2049), 2048)
    assert caught.value.param == "method.reft.hyperparameters.max_length"


def test_a_method_with_the_fields_of_another_type_is_refused() -> None:
    supervised = {"hyperparameters": {"n_epochs": 1}}
    for method in ({"type": "supervised", "reft": {"rank": 1}}, {"type": "reft", "supervised": supervised}):
        with pytest.raises(InvalidRequest, match="does not go with"):
            planned(method)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"rank": 65}, "method.reft.rank"),
        ({"positions": "m1"}, "method.reft.positions"),
        ({"layers": [30]}, "method.reft.layers"),
        ({"family": "magic"}, "method.reft.family"),
    ],
)
def test_an_invalid_field_is_refused_with_and_without_candidates(fields: dict[str, Any], param: str) -> None:
    for hyperparameters in ("auto", {}):
        with pytest.raises(InvalidRequest) as caught:
            planned(reft(**fields, hyperparameters=hyperparameters))
        assert caught.value.param == param


def swept(sweep: dict[str, object], seed: int = 0) -> list[dict[str, object]]:
    method = Method.model_validate(reft(sweep=sweep))
    plan = make_plan(method, BASE, LABELS, max_length=512, seed=seed)
    return [variant.model_dump(exclude_none=True) for variant in plan.sweep]


def test_a_sweep_tries_every_combination_if_its_trials_suffice() -> None:
    trials = swept({"layers": [[3], "all"], "rank": [1, 2], "trials": 8})
    assert len(trials) == 4
    assert {(len(t["layers"]), t["rank"]) for t in trials} == {(1, 1), (1, 2), (30, 1), (30, 2)}  # type: ignore[arg-type]


def test_a_sweep_draws_from_too_many_combinations_by_the_seed() -> None:
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
        ({"rank": [4, 65]}, "method.reft.sweep.rank"),
        ({"positions": ["l1", "m1"]}, "method.reft.sweep.positions"),
        ({"layers": [[30]]}, "method.reft.sweep.layers"),
    ],
)
def test_an_invalid_sweep_is_refused_with_the_field(sweep: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        swept(sweep)
    assert caught.value.param == param


@pytest.mark.parametrize("sweep", [{"rank": [0]}, {"learning_rate": [0.0]}, {"dropout": [0.0, 1.0]}])
def test_numbers_that_no_method_takes_are_refused_by_the_request(sweep: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=rf"reft\.sweep\.{next(iter(sweep))}"):
        swept(sweep)
