"""Examples of data sets with labels in the place of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from reftserve.server.datasets import Example, encode
from reftserve.server.evaluation.label_scoring import LabelledPrompt


def label_example(tokenizer: PreTrainedTokenizerBase, example: Example, labels: Sequence[str]) -> LabelledPrompt:
    """The example's prompt with each label as its answer."""
    encoded = [encode(tokenizer, replace(example, target=label)) for label in labels]
    return LabelledPrompt(list(encoded[0].prompt_ids), [list(each.completion_ids) for each in encoded])
