"""The reference for the fast training: padded batches through the whole model with attached edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from reftserve.interventions import PlacedEdit, TrainableIntervention, attach
from reftserve.server.datasets import EncodedExample

IGNORED = -100


def plain_loss(
    model: PreTrainedModel, examples: Sequence[EncodedExample], edits: TrainableIntervention | Sequence[PlacedEdit]
) -> Tensor:
    width = max(example.length for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : example.length] = torch.tensor(example.prompt_ids + example.completion_ids)
        labels[row, len(example.prompt_ids) - 1 : example.length - 1] = torch.tensor(example.completion_ids)
    with attach(model, edits, torch.tensor([len(example.prompt_ids) for example in examples])):
        logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
