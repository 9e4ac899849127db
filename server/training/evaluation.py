"""Scores of a model, intervened or not, on held-out examples; teacher-forced, so one forward pass an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from reftserve.server.training.data import EncodedExample

IGNORED = -100


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded examples.

    input_ids: [batch, tokens]. labels: [batch, kept], the tokens to predict at `columns` [kept], IGNORED elsewhere.
    n_prompt: [batch].
    """

    input_ids: Tensor
    columns: Tensor
    labels: Tensor
    n_prompt: Tensor

    @property
    def num_targets(self) -> int:
        """Completion tokens in the batch."""
        return int((self.labels != IGNORED).sum())


def collate(examples: Sequence[EncodedExample], device: torch.device) -> TokenBatch:
    """Pad examples on the right, and find the columns whose logits predict a completion token.

    Padding follows everything that matters, so causal attention needs no mask.
    """
    width = max(example.length for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    targets = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        input_ids[row, : example.length] = torch.tensor(example.prompt_ids + example.completion_ids)
        targets[row, len(example.prompt_ids) - 1 : example.length - 1] = torch.tensor(example.completion_ids)
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    return TokenBatch(
        input_ids=input_ids.to(device),
        columns=columns.to(device),
        labels=targets[:, columns].to(device),
        n_prompt=torch.tensor([len(example.prompt_ids) for example in examples]),
    )


def forward(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits [batch, kept, vocabulary] at the batch's columns; only they reach the language-model head."""
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.columns).logits
    return logits


def completion_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over completion tokens."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


@dataclass
class Score:
    """Sums over examples, from which the means are taken."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0
    exact: int = 0
    examples: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        counted = labels != IGNORED
        right = (logits.argmax(dim=-1) == labels) & counted
        self.loss += float(completion_loss(logits, labels)) * int(counted.sum())
        self.correct += int(right.sum())
        self.tokens += int(counted.sum())
        self.exact += int((right | ~counted).all(dim=1).sum())
        self.examples += labels.shape[0]

    def means(self) -> dict[str, float]:
        """Loss a token, token_accuracy, and exact_match: the share of examples whose whole completion is greedy's."""
        return {
            "loss": self.loss / self.tokens,
            "token_accuracy": self.correct / self.tokens,
            "exact_match": self.exact / self.examples,
        }
