"""The rules of every request model: null means "not given", and no string holds half a surrogate pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from reftserve.client import schemas
from reftserve.client.schemas import (
    AssistantMessage,
    ChatMessage,
    Request,
    evals,
    fine_tuning,
    generation,
    interventions,
)

HALF = "\ud800"
HELLO = {"role": "user", "content": "hello"}
FORMAT: dict[str, Any] = {"schema": {"type": "object"}}

# The smallest valid body of each model. The first test fails if a model is missing here.
LEAST: dict[type[Request], dict[str, Any]] = {
    generation.TextPart: {"type": "text", "text": "a"},
    generation.ChatMessage: HELLO,
    generation.InterventionUse: {"name": "a"},
    generation.TextFormat: {"type": "text"},
    generation.JsonObjectFormat: {"type": "json_object"},
    generation.NamedSchema: FORMAT,
    generation.JsonSchemaFormat: {"type": "json_schema", "json_schema": FORMAT},
    generation.StructuredOutputs: {},
    generation.StreamOptions: {},
    generation.GenerationFields: {"model": "a"},
    generation.ChatCompletionRequest: {"model": "a", "messages": [HELLO]},
    generation.CompletionRequest: {"model": "a", "prompt": "b"},
    schemas.ClassifyRequest: {"model": "a", "labels": ["b", "c"]},
    evals.Criterion: {},
    evals.LikelihoodCriterion: {"type": "loss"},
    evals.AccuracyCriterion: {"type": "accuracy"},
    evals.ExactMatchCriterion: {"type": "exact_match"},
    evals.OverlapCriterion: {"type": "f1"},
    evals.ContainsCriterion: {"type": "contains"},
    evals.RegexCriterion: {"type": "regex", "pattern": "a"},
    evals.FileDataSource: {"file_id": "a"},
    evals.EvalCreate: {"data_source_config": {"file_id": "a"}, "testing_criteria": [{"type": "loss"}]},
    evals.EvalSampling: {},
    evals.CompletionsDataSource: {"model": "a"},
    evals.EvalRunCreate: {"data_source": {"model": "a"}},
    fine_tuning.SupervisedHyperparameters: {},
    fine_tuning.SupervisedMethod: {},
    fine_tuning.ReftHyperparameters: {},
    fine_tuning.Range: {"low": 1, "high": 2},
    fine_tuning.ReftSweep: {},
    fine_tuning.ReftMethod: {},
    fine_tuning.Method: {"type": "reft"},
    fine_tuning.FineTuningJobCreate: {"model": "a", "training_file": "b"},
    interventions.AliasUpdate: {"version": 1},
}


def subclasses(kind: type[Request]) -> Iterator[type[Request]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("reftserve.client"):
            yield child
            yield from subclasses(child)


def schema_of(kind: type[Request]) -> dict[str, Any]:
    return kind.model_json_schema()


def optional_fields() -> list[Any]:
    return [
        pytest.param(kind, field, id=f"{kind.__name__}-{field}")
        for kind in LEAST
        for field in schema_of(kind)["properties"]
        if field not in schema_of(kind).get("required", [])
    ]


def broken_fields() -> list[Any]:
    found = []
    for kind in LEAST:
        for field, schema in schema_of(kind)["properties"].items():
            name = f"{kind.__name__}-{field}"
            found += [
                pytest.param(kind, field, value, id=f"{name}-{type(value).__name__}") for value in broken_values(schema)
            ]
    return found


def broken_values(schema: dict[str, Any]) -> Iterator[Any]:
    for form in schema.get("anyOf", [schema]):
        if form.get("type") == "string" and not {"const", "enum"} & form.keys():
            yield HALF
        elif form.get("type") == "array":
            yield from ([value, "b"] for value in broken_values(form["items"]))
        elif form.get("type") == "object" and (
            form["additionalProperties"] is True or form["additionalProperties"].get("type") == "string"
        ):
            yield {HALF: "a"}
            yield {"a": HALF}
            if form["additionalProperties"] is True:
                yield {"a": [{"b": [1, HALF]}]}


def test_every_request_model_has_an_example() -> None:
    assert set(subclasses(Request)) == LEAST.keys()


@pytest.mark.parametrize(("kind", "field"), optional_fields())
def test_null_and_empty_values_are_the_default(kind: type[Request], field: str) -> None:
    least = {name: value for name, value in LEAST[kind].items() if name != field}
    for nothing in (None, [], {}):
        if nothing is None or field not in kind.meaningful_when_empty:
            assert kind.model_validate({**least, field: nothing}) == kind.model_validate(least)


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_a_default_that_clients_spell_out_is_not_given_and_other_values_are_refused(kind: type[Request]) -> None:
    for field, values in kind.neutral.items():
        for value in values:
            assert kind.model_validate({**LEAST[kind], field: value}) == kind.model_validate(LEAST[kind])
        with pytest.raises(ValidationError, match=field):
            kind.model_validate({**LEAST[kind], field: ["another"]})


def test_the_schema_that_allows_any_json_is_not_empty() -> None:
    assert schemas.StructuredOutputs.model_validate({"json": {}}).json_schema == {}


def test_true_is_no_number() -> None:
    kinds = [(kind, name, form) for kind in LEAST for name, form in schema_of(kind)["properties"].items()]
    numbers = [
        (kind, name)
        for kind, name, form in kinds
        for each in form.get("anyOf", [form])
        if each.get("type") in ("integer", "number")
    ]
    assert len(numbers) > 30
    for kind, name in numbers:
        with pytest.raises(ValidationError, match=name):
            kind.model_validate({**LEAST[kind], name: True})


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_a_null_required_field_counts_as_missing(kind: type[Request]) -> None:
    for field in schema_of(kind).get("required", []):
        with pytest.raises(ValidationError) as refused:
            kind.model_validate({**LEAST[kind], field: None})
        assert [(error["loc"], error["type"]) for error in refused.value.errors()] == [((field,), "missing")]


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_ignored_if_empty_and_refused_by_name_otherwise(
    kind: type[Request],
) -> None:
    for nothing in (None, [], {}):
        assert kind.model_validate({**LEAST[kind], "refusal": nothing}) == kind.model_validate(LEAST[kind])
    for something in (False, 0, "", [None], {"a": None}):
        with pytest.raises(ValidationError) as refused:
            kind.model_validate({**LEAST[kind], "refusal": something})
        assert [(error["loc"], error["type"]) for error in refused.value.errors()] == [
            (("refusal",), "extra_forbidden")
        ]


@pytest.mark.parametrize(("kind", "field", "value"), broken_fields())
def test_half_a_surrogate_pair_is_refused_with_its_field(kind: type[Request], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({**LEAST[kind], field: value})
    errors = refused.value.errors()
    assert {error["loc"][0] for error in errors} == {field}
    # A union of types has an error for each.
    assert {error["type"] for error in errors} & {"half_surrogate_pair", "string_unicode"}


def test_a_value_nested_beyond_the_recursion_limit_is_checked() -> None:
    deep: Any = [HALF]
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValidationError, match="surrogate"):
        schemas.ChatCompletionRequest(model="a", messages=[ChatMessage(**HELLO)], metadata={"a": deep})


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "tool_calls": []},
    ],
)
def test_an_assistant_message_without_content_has_an_empty_text(turn: dict[str, Any]) -> None:
    assert ChatMessage.model_validate(turn).text == ""


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_only_an_assistant_may_omit_the_content(role: str) -> None:
    with pytest.raises(ValidationError, match="content"):
        ChatMessage.model_validate({"role": role, "content": None})


def test_a_turn_of_a_tool_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match="tools are not supported"):
        ChatMessage.model_validate({"role": "tool", "content": "4", "tool_call_id": "call_1"})


def test_a_part_that_is_no_text_is_refused_with_the_reason() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(ValidationError, match="'image_url' is not supported; content is text only") as refused:
        ChatMessage.model_validate({"role": "user", "content": [{"type": "text", "text": "a"}, image]})
    assert "extra_forbidden" not in {error["type"] for error in refused.value.errors()}


def test_our_own_answer_is_accepted_as_input_unchanged() -> None:
    for text in ("", "hi"):
        turn = AssistantMessage(content=text).model_dump()
        assert ChatMessage.model_validate(turn) == ChatMessage(role="assistant", content=text)
