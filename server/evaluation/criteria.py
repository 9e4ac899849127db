"""The criteria of an evaluation: check them against the data set, and score them on one item. `tally.py` sums up.

A score is the mean over items, weighted by tokens for loss and perplexity; perplexity is that mean's exponential.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic_core import SchemaError, SchemaValidator, core_schema

from reftserve.client.schemas import (
    AccuracyCriterion,
    ContainsCriterion,
    ExactMatchCriterion,
    ItemResult,
    LikelihoodCriterion,
    OverlapCriterion,
    RegexCriterion,
    TestingCriterion,
)
from reftserve.client.schemas.classify import MAX_LABELS
from reftserve.server.errors import InvalidRequest
from reftserve.server.evaluation import text_metrics as metrics
from reftserve.server.inference.labels import probabilities

LARGEST_LOSS = 700.0  # exp(700) is still a finite float


@dataclass(frozen=True)
class ItemAnswer:
    """An item's reference, its greedy output, and the log-probabilities of the reference's and each label's tokens."""

    reference: str
    output: str = ""
    reference_logprobs: list[float] = field(default_factory=list)
    label_logprobs: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The score of one criterion on one item."""

    value: float
    weight: float = 1.0
    passed: bool | None = None
    label: str | None = None


def check_criteria(
    criteria: Sequence[TestingCriterion], read_references: Callable[[], list[str]]
) -> list[TestingCriterion]:
    """Return criteria with names and labels filled in. Raises InvalidRequest for bad names, patterns or labels.

    read_references: reads the data's answers; called only if a criterion needs them.
    """
    answers = read_references() if any(isinstance(c, AccuracyCriterion) for c in criteria) else []
    checked: list[TestingCriterion] = []
    for index, criterion in enumerate(criteria):
        param = f"testing_criteria.{index}"
        name = criterion.name or criterion.type
        if any(name == other.name for other in checked):
            raise InvalidRequest(f"two criteria are named {name!r}; give each a name of its own", param=f"{param}.name")
        if isinstance(criterion, RegexCriterion):
            _check_pattern(criterion.pattern, f"{param}.pattern")
        if isinstance(criterion, AccuracyCriterion):
            labels = _check_labels(criterion.labels, answers, f"{param}.labels")
            criterion = criterion.model_copy(update={"labels": labels})
        checked.append(criterion.model_copy(update={"name": name}))
    return checked


def needs_output(criteria: Sequence[TestingCriterion]) -> bool:
    """Return whether a criterion reads the greedy answer."""
    read = ExactMatchCriterion | OverlapCriterion | ContainsCriterion | RegexCriterion
    return any(isinstance(c, read) for c in criteria)


def needs_reference_logprobs(criteria: Sequence[TestingCriterion]) -> bool:
    """Return whether a criterion reads the log-probabilities of the reference."""
    return any(isinstance(c, LikelihoodCriterion) for c in criteria)


def label_sets(criteria: Sequence[TestingCriterion]) -> dict[str, list[str]]:
    """Return the labels of each accuracy criterion, by its name."""
    return {str(c.name): c.labels or [] for c in criteria if isinstance(c, AccuracyCriterion)}


def measure(criterion: TestingCriterion, item: ItemAnswer) -> Score:
    """Score a criterion on an item."""
    match criterion:
        case LikelihoodCriterion():
            tokens = len(item.reference_logprobs)
            return Score(-math.fsum(item.reference_logprobs) / tokens, weight=tokens)
        case AccuracyCriterion():
            labels = criterion.labels or []
            probs = probabilities(item.label_logprobs[str(criterion.name)], criterion.normalize)
            label = labels[probs.index(max(probs))]
            return _pass_or_fail(label == item.reference, label)
        case ExactMatchCriterion(normalize="squad"):
            return _pass_or_fail(metrics.squad_exact_match(item.output, item.reference))
        case ExactMatchCriterion():
            return _pass_or_fail(metrics.exact_match(item.output, item.reference))
        case OverlapCriterion():
            return Score(metrics.f1(item.output, item.reference))
        case ContainsCriterion():
            text, output = criterion.text or item.reference.strip(), item.output
            if criterion.ignore_case:
                text, output = text.casefold(), output.casefold()
            return _pass_or_fail(text in output)
        case RegexCriterion():
            return _pass_or_fail(_pattern(criterion.pattern).isinstance_python(item.output))


def final(criterion: TestingCriterion, mean: float) -> float:
    """Return the criterion's score from the weighted mean over items."""
    if isinstance(criterion, LikelihoodCriterion) and criterion.type == "perplexity":
        return math.exp(min(mean, LARGEST_LOSS))
    return mean


def item_result(criterion: TestingCriterion, measured: Score) -> ItemResult:
    """Return an item's score in its wire form."""
    return ItemResult(
        name=str(criterion.name),
        score=final(criterion, measured.value),
        passed=measured.passed,
        label=measured.label,
        tokens=int(measured.weight) if isinstance(criterion, LikelihoodCriterion) else None,
    )


def _pass_or_fail(passed: bool, label: str | None = None) -> Score:
    return Score(float(passed), passed=passed, label=label)


def _check_labels(given: list[str] | None, answers: list[str], param: str) -> list[str]:
    distinct = list(dict.fromkeys(answers))
    if given is None:
        if not 2 <= len(distinct) <= MAX_LABELS:
            raise InvalidRequest(
                f"the data has {len(distinct)} different answers; 2 to {MAX_LABELS} can be a label set. Give labels, "
                "or use exact_match or f1",
                param=param,
            )
        return distinct
    if len(set(given)) < len(given):
        raise InvalidRequest("a label is given twice", param=param)
    missing = next((number for number, answer in enumerate(answers) if answer not in given), None)
    if missing is not None:
        raise InvalidRequest(
            f"example {missing} has the answer {answers[missing]!r}, which is none of the labels {given[:10]}",
            param=param,
        )
    return given


def _check_pattern(pattern: str, param: str) -> None:
    try:
        _pattern(pattern)
    except SchemaError as cause:
        reason = " ".join(str(cause).partition("SchemaError:")[2].split())
        raise InvalidRequest(f"pattern {pattern!r}: {reason}", param=param) from cause


@functools.lru_cache(maxsize=256)
def _pattern(pattern: str) -> SchemaValidator:
    # pydantic matches with Rust's regex crate: its time is linear in the text for every pattern.
    return SchemaValidator(core_schema.str_schema(pattern=pattern))
