"""Scores of completions, teacher-forced: from the logits of their tokens, examples one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass
class Score:
    """What was found of each example, from which the means are taken. losses: sums over an example's tokens."""

    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    correct: int = 0
    exact: int = 0

    def add(self, logits: Tensor, labels: Tensor, counts: Sequence[int]) -> None:
        """Count examples of so many completion tokens. logits: [targets, vocabulary]. labels: [targets]."""
        right = logits.argmax(dim=-1) == labels
        each = functional.cross_entropy(logits.float(), labels, reduction="none")
        self.losses += torch.stack([part.sum() for part in torch.split(each, list(counts))]).tolist()
        self.counts += counts
        self.correct += int(right.sum())
        self.exact += sum(bool(part.all()) for part in torch.split(right, list(counts)))

    def reordered(self, order: Sequence[int]) -> Score:
        """Return the same score with its examples in another order, given by their numbers now."""
        losses, counts = [self.losses[number] for number in order], [self.counts[number] for number in order]
        return Score(losses, counts, self.correct, self.exact)

    def means(self) -> dict[str, float]:
        """Loss a token and its standard error, token_accuracy, exact_match: the share of wholly greedy completions.

        The loss is a ratio of sums over examples; its error is that of the ratio estimator, linearised (Cochran 1977,
        2.11). Of a single example it is 0: nothing is known of it.
        """
        tokens, examples = sum(self.counts), len(self.counts)
        loss = math.fsum(self.losses) / tokens
        residuals = [each - loss * count for each, count in zip(self.losses, self.counts, strict=True)]
        return {
            "loss": loss,
            "loss_stderr": math.hypot(*residuals) / tokens,
            "token_accuracy": self.correct / tokens,
            "exact_match": self.exact / examples,
        }


def paired_difference(
    one: NDArray[np.float64], other: NDArray[np.float64], tokens: NDArray[np.int64]
) -> tuple[float, float | None]:
    """Return one's loss a token minus the other's, and the standard error of the difference.

    Paired: `one`, `other` and `tokens` are of the same examples in one order, [examples]; losses are sums over an
    example's tokens. The error is that of `Score.means`; None with a single example, of which nothing is known.
    """
    differences = one - other
    total = int(tokens.sum())
    difference = float(differences.sum()) / total
    if len(tokens) == 1:
        return difference, None
    return difference, float(np.linalg.norm(differences - difference * tokens)) / total
