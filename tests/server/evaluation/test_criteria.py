"""Criteria on single answers, and the errors of invalid criteria before a run starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter

from reftserve.client.schemas import EvalError, TestingCriterion
from reftserve.server.errors import InvalidRequest
from reftserve.server.evaluation.criteria import ItemAnswer, check_criteria, measure
from reftserve.server.evaluation.tally import Tally

PARSE: TypeAdapter[TestingCriterion] = TypeAdapter(TestingCriterion)


def criterion(kind: str, **fields: Any) -> TestingCriterion:
    return PARSE.validate_python({"name": kind, "type": kind, **fields})


def passes(criterion: TestingCriterion, output: str, reference: str = "yes") -> bool | None:
    return measure(criterion, ItemAnswer(reference=reference, output=output)).passed


def test_contains_searches_for_the_given_text_or_the_reference_answer() -> None:
    assert passes(criterion("contains"), "oh yes!", reference=" yes ")
    assert not passes(criterion("contains"), "oh Yes!")
    assert passes(criterion("contains", ignore_case=True), "oh Yes!")
    assert passes(criterion("contains", text="no"), "oh no!")
    assert not passes(criterion("contains", text="no"), "oh yes!")


def test_an_exact_match_is_strict_unless_the_criterion_names_squads_rules() -> None:
    assert passes(criterion("exact_match"), " 1.5\n", reference="1.5")
    assert not passes(criterion("exact_match"), "15", reference="1.5")
    assert passes(criterion("exact_match", normalize="squad"), "15", reference="1.5")
    assert not passes(criterion("exact_match", normalize="squad"), "16", reference="1.5")


def test_a_pattern_is_found_anywhere_in_the_answer() -> None:
    digits = criterion("regex", pattern=r"\d{3}")
    assert passes(digits, "call 911 now")
    assert not passes(digits, "call 91 now")
    assert not passes(criterion("regex", pattern=r"^\d+$"), "911 now")


def test_every_pattern_matches_in_time_linear_in_the_text() -> None:
    # A backtracking matcher would not end.
    assert not passes(criterion("regex", pattern=r"^(a+)+$"), "a" * 100_000 + "b")


def test_the_likeliest_label_is_right_or_wrong() -> None:
    item = ItemAnswer(reference="no", label_logprobs={"accuracy": [[-1.0, -1.0], [-1.9]]})
    by_sum = measure(criterion("accuracy", labels=["yes", "no"]), item)
    assert (by_sum.label, by_sum.passed) == ("no", True)
    by_mean = measure(criterion("accuracy", labels=["yes", "no"], normalize="tokens"), item)
    assert (by_mean.label, by_mean.passed) == ("yes", False)


def test_loss_and_perplexity_are_means_over_tokens_not_over_items() -> None:
    criteria = [criterion("loss"), criterion("perplexity"), criterion("f1")]
    tally = Tally()
    for logprobs in ([-1.0], [-2.0, -3.0, -4.0]):
        item = ItemAnswer(reference="yes", output="yes", reference_logprobs=logprobs)
        assert tally.add({str(c.name): measure(c, item) for c in criteria}) == "pass"
    assert tally.add(EvalError(code="too_long", message="too long")) == "error"
    loss, perplexity, f1 = tally.results(criteria)
    assert loss.score == pytest.approx(2.5)
    assert perplexity.score == pytest.approx(math.exp(2.5))
    assert f1.score == 1
    assert (loss.passed, loss.failed) == (None, None)
    assert tally.counts(3).model_dump() == {"total": 3, "passed": 2, "failed": 0, "errored": 1}


def test_an_item_passes_when_it_passes_every_criterion() -> None:
    criteria = [criterion("exact_match"), criterion("contains", text="y")]
    tally = Tally()
    for output in ("yes", "yesterday", "no"):
        tally.add({str(c.name): measure(c, ItemAnswer(reference="yes", output=output)) for c in criteria})
    assert (tally.passed, tally.failed) == (1, 2)
    assert [(result.passed, result.failed) for result in tally.results(criteria)] == [(1, 2), (2, 1)]


def test_names_and_labels_are_filled_in() -> None:
    criteria = [PARSE.validate_python(c) for c in ({"type": "accuracy"}, {"type": "f1", "name": "overlap"})]
    accuracy, overlap = check_criteria(criteria, lambda: ["yes", "no", "yes"])
    assert (accuracy.name, accuracy.labels) == ("accuracy", ["yes", "no"])  # type: ignore[union-attr]
    assert overlap.name == "overlap"


@pytest.mark.parametrize(
    ("criteria", "param", "words"),
    [
        ([{"type": "f1"}, {"type": "f1"}], "testing_criteria.1.name", "two criteria are named 'f1'"),
        ([{"type": "regex", "pattern": "(a"}], "testing_criteria.0.pattern", "unclosed group"),
        ([{"type": "regex", "pattern": "(?=a)"}], "testing_criteria.0.pattern", "look-around"),
        ([{"type": "accuracy", "labels": ["a", "b"]}], "testing_criteria.0.labels", "example 0 has the answer 'yes'"),
        ([{"type": "accuracy", "labels": ["yes", "no", "no"]}], "testing_criteria.0.labels", "given twice"),
    ],
)
def test_an_invalid_criterion_is_refused_with_the_reason(
    criteria: list[dict[str, Any]], param: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as raised:
        check_criteria([PARSE.validate_python(c) for c in criteria], lambda: ["yes", "no"])
    assert raised.value.param == param


def test_labels_of_the_data_must_be_few_and_not_one() -> None:
    for answers in (["yes"] * 5, [str(number) for number in range(1001)]):
        with pytest.raises(InvalidRequest, match="different answers"):
            check_criteria([PARSE.validate_python({"type": "accuracy"})], answers.copy)


def test_the_data_is_read_only_for_a_criterion_that_needs_its_answers() -> None:
    reads: list[int] = []

    def read() -> list[str]:
        reads.append(1)
        return ["yes", "no"]

    others = [{"type": "loss"}, {"type": "contains", "text": "a"}, {"type": "regex", "pattern": "a"}]
    check_criteria([PARSE.validate_python(c) for c in others], read)
    assert reads == []
    check_criteria([PARSE.validate_python(c) for c in [*others, {"type": "accuracy"}]], read)
    assert reads == [1]
