"""Examples of data sets as evaluation sees them: a prompt, the answer that the data holds, and labels in its place."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from reftserve.server.evaluation.labels import LabelledPrompt, label_chat, label_texts
from reftserve.server.training.dataset import ChatExample, EncodedExample, Example, encode, read_examples

__all__ = ["EncodedExample", "Example", "encode", "label_example", "read_examples", "reference"]


def reference(example: Example) -> str:
    """The answer that the data holds."""
    return example.messages[-1].text if isinstance(example, ChatExample) else example.completion


def label_example(tokenizer: PreTrainedTokenizerBase, example: Example, labels: Sequence[str]) -> LabelledPrompt:
    """The example's prompt with each label in the place of its answer."""
    if isinstance(example, ChatExample):
        return label_chat(tokenizer, example.messages[:-1], labels)
    return label_texts(tokenizer, [example.prompt], labels)[0]
