"""Exact match and F1 as the SQuAD benchmark's own script computes them."""

from __future__ import annotations

import pytest

from reftserve.server.evaluation.metrics import exact_match, f1, normalized


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat!", "cat"),
        ("an apple, a day", "apple day"),
        ("theory of a theme", "theory of theme"),
        ("U.S.A.", "usa"),
        (" well-known\n fact ", "wellknown fact"),
        ("the", ""),
        ("É 3.5%", "é 35"),
    ],
)
def test_case_punctuation_articles_and_spaces_do_not_count(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "overlap"),
    [
        ("The Denver Broncos.", "denver broncos", 1.0, 1.0),
        ("Broncos", "Denver Broncos", 0.0, 2 / 3),
        ("the city of Denver", "Denver Broncos", 0.0, 0.4),
        ("Denver Denver", "Denver", 0.0, 2 / 3),
        ("Carolina", "Denver", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
        ("", "Denver", 0.0, 0.0),
        ("Denver", "the", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(prediction: str, reference: str, match: float, overlap: float) -> None:
    assert exact_match(prediction, reference) == match
    assert f1(prediction, reference) == pytest.approx(overlap)
