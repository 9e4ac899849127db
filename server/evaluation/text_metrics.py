"""Agreement of two texts: exact, or by SQuAD's rules for short English phrases (Rajpurkar et al. 2016, script 1.1)."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return the text in lower case with single spaces, without English articles and punctuation (so without signs)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether the texts are equal, apart from surrounding white space."""
    return prediction.strip() == reference.strip()


def squad_exact_match(prediction: str, reference: str) -> bool:
    """Return whether the normalized texts are equal."""
    return normalized(prediction) == normalized(reference)


def f1(prediction: str, reference: str) -> float:
    """Return SQuAD's F1 over normalized words; if a text has none, 1 if neither has any, else 0 (script version 2)."""
    predicted, expected = normalized(prediction).split(), normalized(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)
