"""Teacher-forced scores of completions, computed from the logits of their tokens."""

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
    """Losses and token counts of each example, [examples], and hits. losses: sums over an example's tokens."""

    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    correct: int = 0
    exact: int = 0

    def add(self, logits: Tensor, labels: Tensor, counts: Sequence[int]) -> None:
        """Add examples. counts: completion tokens of each. logits: [targets, vocabulary]. labels: [targets]."""
        right = logits.argmax(dim=-1) == labels
        each = functional.cross_entropy(logits.float(), labels, reduction="none")
        self.losses += torch.stack([part.sum() for part in torch.split(each, list(counts))]).tolist()
        self.counts += counts
        self.correct += int(right.sum())
        self.exact += sum(bool(part.all()) for part in torch.split(right, list(counts)))

    def reordered(self, order: Sequence[int]) -> Score:
        """Return the same score with its examples in another order. order: their current indices."""
        losses, counts = [self.losses[number] for number in order], [self.counts[number] for number in order]
        return Score(losses, counts, self.correct, self.exact)

    def means(self) -> dict[str, float]:
        """Return the loss per token, its standard error, token_accuracy, and exact_match (share of greedy completions).

        The error is the linearised ratio estimator's (Cochran 1977, 2.11); a single example has none, given as 0.
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
    """Return the difference in loss per token, `one` minus `other`, and its standard error, None for one example.

    one, other: losses per example in one order, summed over its tokens. tokens: their counts. All are [examples].
    """
    differences = one - other
    total = int(tokens.sum())
    difference = float(differences.sum()) / total
    if len(tokens) == 1:
        return difference, None
    return difference, float(np.linalg.norm(differences - difference * tokens)) / total
