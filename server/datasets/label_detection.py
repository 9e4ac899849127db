"""Detection of classification data: few different short answers, each given at least twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from reftserve.server.datasets.examples import Example

MAX_LABELS = 20
MAX_LABEL_CHARACTERS = 40


def label_set(examples: Iterable[Example]) -> tuple[str, ...] | None:
    """Return the labels, spelt as in the targets and sorted; None when the targets do not look like labels."""
    counts = Counter(example.target for example in examples)
    are_labels = (
        2 <= len(counts) <= MAX_LABELS and min(counts.values()) >= 2 and max(map(len, counts)) <= MAX_LABEL_CHARACTERS
    )
    return tuple(sorted(counts)) if are_labels else None
