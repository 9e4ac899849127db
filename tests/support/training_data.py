"""Plans and random examples for tests of the trainer."""

from __future__ import annotations

import random

import torch

from reftserve.server.datasets import EncodedExample
from reftserve.server.training.plan import Plan


def plan(**changes: object) -> Plan:
    fields = {
        "family": "loreft",
        "layers": [1, 2],
        "positions": "f2+l2",
        "rank": 2,
        "dropout": 0.1,
        "tied": False,
        "n_epochs": 4,
        "batch_size": 3,
        "learning_rate": 0.01,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_length": 64,
    }
    return Plan.model_validate({**fields, **changes})


def examples(count: int, seed: int, vocabulary: int = 300, tail: int = 0) -> list[EncodedExample]:
    """Return examples: prompts of 2 to 11 random tokens, completions of 2 learnable and up to `tail` random ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())

    return [EncodedExample(draw(2, 12), (7 + i % 2, 2, *draw(0, tail + 1))) for i in range(count)]


def beginning_alike(data: list[EncodedExample], seed: int, common: int, vocabulary: int = 100) -> list[EncodedExample]:
    """Return the examples, each with one of two random texts of `common` tokens, or a part of it, in front."""
    draw = random.Random(seed)  # noqa: S311 - data for a test, not a secret
    texts = [tuple(draw.randrange(3, vocabulary) for _ in range(common)) for _ in range(2)]
    cuts = [draw.choice([common, draw.randint(0, common)]) for _ in data]
    begun = [draw.choice(texts)[:cut] for cut in cuts]
    return [EncodedExample(text + e.prompt_ids, e.completion_ids) for text, e in zip(begun, data, strict=True)]
