"""Scores of completions, teacher-forced: from the logits of their tokens, examples one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Score:
    """Sums over examples, from which the means are taken."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0
    exact: int = 0
    examples: int = 0

    def add(self, logits: Tensor, labels: Tensor, counts: Sequence[int]) -> None:
        """Count examples of so many completion tokens. logits: [targets, vocabulary]. labels: [targets]."""
        right = logits.argmax(dim=-1) == labels
        self.loss += float(functional.cross_entropy(logits.float(), labels, reduction="sum"))
        self.correct += int(right.sum())
        self.tokens += len(labels)
        self.exact += sum(bool(part.all()) for part in torch.split(right, list(counts)))
        self.examples += len(counts)

    def means(self) -> dict[str, float]:
        """Loss a token, token_accuracy, and exact_match: the share of examples whose whole completion is greedy's."""
        return {
            "loss": self.loss / self.tokens,
            "token_accuracy": self.correct / self.tokens,
            "exact_match": self.exact / self.examples,
        }
