"""The report on a data set, made before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_base_tokenizer

from reftserve.client.schemas import DataReport
from reftserve.server.datasets import (
    Example,
    SourceLocation,
    encode,
    encode_file,
    label_set,
    make_report,
    read_examples,
)
from reftserve.server.errors import InvalidRequest

TOKENIZER = tiny_base_tokenizer()


def pairs(*prompts_and_targets: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": target} for prompt, target in prompts_and_targets]


SUMS = pairs(*((f"{i}+1=", str(i + 1)) for i in range(30)))


@pytest.fixture
def report(tmp_path: Path):  # type: ignore[no-untyped-def]
    def report(training: list[Any], validation: list[Any] | None = None, max_length: int = 64) -> DataReport:
        files = {}
        for name, rows in (("training", training), ("validation", validation)):
            path = tmp_path / name
            path.write_text("\n".join(map(json.dumps, rows or [])))
            if rows is not None:
                files[name] = encode_file(TOKENIZER, path, f"{name}_file", max_length=max_length)
        return make_report(files["training"], files.get("validation"), max_length=max_length, seed=0)

    return report


def test_a_clean_data_set_is_counted_without_warnings(report) -> None:  # type: ignore[no-untyped-def]
    found = report(SUMS)
    assert (found.training.rows, found.training.examples, found.training.targets) == (30, 30, 30)
    assert found.splits.model_dump() == {"train": 24, "validation": 3, "test": 3}
    assert (found.validation, found.labels, found.warnings) == (None, None, [])


def test_token_lengths_are_those_of_the_encoded_examples(report, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows = pairs(*(("x" * i, "y") for i in range(1, 101)))
    found = report(rows, max_length=200).training
    lengths = sorted(len(encode(TOKENIZER, e).prompt_ids) for e in read_examples(tmp_path / "training"))
    assert found.prompt_tokens.model_dump() == {
        "p50": lengths[49],
        "p90": lengths[89],
        "p99": lengths[98],
        "max": lengths[99],
    }
    assert found.completion_tokens.max == 2, "a token and the end of the turn"
    assert found.total_tokens.max == found.prompt_tokens.max + 2


def test_turns_and_rows_are_counted_separately(report) -> None:  # type: ignore[no-untyped-def]
    def row(i: int) -> dict[str, Any]:
        turns = [("user", f"{i}?"), ("assistant", f"{i}!"), ("user", "sure?"), ("assistant", f"yes, {i}")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    found = report([row(i) for i in range(20)], max_length=200)
    assert (found.training.rows, found.training.examples) == (20, 40)


def test_too_long_examples_are_counted_and_left_out(report) -> None:  # type: ignore[no-untyped-def]
    found = report(SUMS + pairs(("q" * 90, "long")))
    assert found.training.too_long == 1
    assert sum(found.splits.model_dump().values()) == 30
    (warning,) = found.warnings
    assert "1 of 31 training examples are left out" in warning
    assert f"64 tokens; the longest has {found.training.total_tokens.max}" in warning


def test_repetitions_and_contradictions_are_distinguished(report) -> None:  # type: ignore[no-untyped-def]
    found = report(SUMS + SUMS[:4] + pairs(("0+1=", "one"), ("0+1=", "uno"), ("1+1=", "two")))
    assert (found.training.duplicates, found.training.conflicts) == (4, 2)
    assert ["repeat another" in found.warnings[0], "different targets" in found.warnings[1]] == [True, True]


def test_equal_targets_give_a_warning(report) -> None:  # type: ignore[no-untyped-def]
    found = report(pairs(*((f"{i}", "yes") for i in range(20))))
    assert found.training.targets == 1
    assert found.labels is None
    assert "all training targets are the same" in found.warnings[0]


def test_prompts_in_both_training_and_validation_are_leaks(report) -> None:  # type: ignore[no-untyped-def]
    found = report(SUMS, SUMS[:3] + pairs(("5*5=", "25"), ("5*6=", "30")))
    assert found.leaked == 3
    assert found.splits.model_dump() == {"train": 30, "validation": 1, "test": 1}
    assert found.validation is not None
    assert "3 of 5 validation examples are left out" in found.warnings[0]


def test_a_few_short_repeated_targets_are_labels(report) -> None:  # type: ignore[no-untyped-def]
    rows = pairs(*((f"review {i}", [" good", " bad", " so so"][i % 3]) for i in range(30)))
    assert report(rows).labels == [" bad", " good", " so so"]
    assert report(rows + pairs(("review", "never seen again"))).labels is None


@given(st.lists(st.text(max_size=60), max_size=60))
def test_a_label_set_is_a_set_of_repeated_targets_or_none(targets: list[str]) -> None:
    labels = label_set(Example(SourceLocation("row", i), "p", target) for i, target in enumerate(targets))
    if labels is not None:
        assert sorted(set(targets)) == list(labels)
        assert 2 <= len(labels) <= 20
        assert all(targets.count(label) > 1 for label in labels)
    else:
        assert len(set(targets)) not in range(2, 21) or any(len(t) > 40 or targets.count(t) == 1 for t in targets)


@pytest.mark.parametrize(
    ("training", "validation", "param", "says"),
    [
        (SUMS[:9], None, "training_file", "9 training examples; at least 10"),
        (
            pairs(*(("q" * length, "long") for length in range(90, 110))),
            None,
            "training_file",
            r"0 of 20 examples have at most max_length, 64 tokens; .* longest, line 20, has \d+ tokens",
        ),
        (
            [*SUMS[:9], *pairs(("q" * 90, "long"))],
            None,
            "training_file",
            r"9 of 10 examples have at most .*; at least 10 are needed. The longest, line 10, has \d+ tokens",
        ),
        (SUMS[:2] * 10, None, "training_file", "three different prompts"),
        (SUMS, SUMS, "validation_file", "two prompts that are not in the training data"),
        (SUMS, pairs(("q" * 90, "long")) * 20, "validation_file", "0 of 20 examples have at most"),
    ],
)
def test_an_untrainable_data_set_is_refused(report, training, validation, param, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidRequest, match=says) as caught:
        report(training, validation)
    assert (caught.value.param, caught.value.code) == (param, "too_few_examples")


def test_a_row_that_the_base_cannot_render_is_named(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}x"
    tokenizer = replace(tiny_base_tokenizer(), chat_template=template)
    rows = [[("user", "a")], [("system", "b"), ("user", "c")]]
    messages = [[{"role": r, "content": t} for r, t in [*row, ("assistant", "d")]] for row in rows]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}) for turns in messages))
    with pytest.raises(InvalidRequest, match="line 2: the chat template refuses these messages: no system role"):
        encode_file(tokenizer, path, "training_file", max_length=64)
