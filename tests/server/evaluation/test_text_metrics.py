"""Exact match (strict, and as in the SQuAD benchmark's script), and F1 as in that script."""

from __future__ import annotations

import pytest

from reftserve.server.evaluation.text_metrics import exact_match, f1, normalized, squad_exact_match


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
        ("The Denver Broncos.", "denver broncos", True, 1.0),
        ("Broncos", "Denver Broncos", False, 2 / 3),
        ("the city of Denver", "Denver Broncos", False, 0.4),
        ("Denver Denver", "Denver", False, 2 / 3),
        ("Carolina", "Denver", False, 0.0),
        ("the", "a", True, 1.0),
        ("", "Denver", False, 0.0),
        ("Denver", "the", False, 0.0),
    ],
)
def test_exact_match_and_f1_are_those_of_squads_script(
    prediction: str, reference: str, match: bool, overlap: float
) -> None:
    assert squad_exact_match(prediction, reference) is match
    assert f1(prediction, reference) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("prediction", "reference"), [("15", "1.5"), ("3", "-3"), (">", "<"), ("", "A"), ("yes", "Yes"), ("a  b", "a b")]
)
def test_different_texts_are_not_an_exact_match(prediction: str, reference: str) -> None:
    assert not exact_match(prediction, reference)
    assert squad_exact_match(prediction, reference)


def test_white_space_around_texts_does_not_count() -> None:
    assert exact_match("\n1.5 ", " 1.5")
