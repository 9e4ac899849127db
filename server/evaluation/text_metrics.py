"""Agreement of two texts: exact, or as the SQuAD benchmark defines it (Rajpurkar et al. 2016, evaluation script 1.1).

SQuAD's rules are made for short English phrases; of numbers, signs and letters they lose what matters.
"""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Whether the texts are the same but for white space around them."""
    return prediction.strip() == reference.strip()


def squad_exact_match(prediction: str, reference: str) -> bool:
    """Whether the normalized texts are the same."""
    return normalized(prediction) == normalized(reference)


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalized texts: SQuAD's F1.

    Where one of them has no words, 1 if neither has, as in version 2 of the script.
    """
    predicted, expected = normalized(prediction).split(), normalized(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)
