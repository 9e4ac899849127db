"""Label sets: a model's probabilities of given texts as the answer to a prompt.

A label includes the end of turn. Otherwise "no" would always be likelier than "none", which starts with it. A label's
log-probability is the sum over its tokens; probabilities are the softmax over the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reftserve.client.schemas import ChatMessage
from reftserve.server.base.prompts import encode_completion, encode_rendered, encode_text, render_answer, render_chat
from reftserve.server.base.tokenizer import Tokenizer

Normalization = Literal["none", "tokens"]


@dataclass(frozen=True)
class LabelledPrompt:
    """Token ids of a prompt, and of each label as its answer with the end of turn."""

    prompt_ids: list[int]
    label_ids: list[list[int]]


def label_chat(tokenizer: Tokenizer, messages: Sequence[ChatMessage], labels: Sequence[str]) -> LabelledPrompt:
    """Encode a conversation, and each label as its next turn. Raises InvalidRequest where the chat template refuses."""
    turns = [[*messages, ChatMessage(role="assistant", content=label)] for label in labels]
    return LabelledPrompt(
        encode_rendered(tokenizer, render_chat(tokenizer, messages)),
        [encode_rendered(tokenizer, render_answer(tokenizer, turn)) for turn in turns],
    )


def label_texts(tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[str]) -> list[LabelledPrompt]:
    """Encode plain texts, and each label as their completion."""
    label_ids = [encode_completion(tokenizer, label) for label in labels]
    return [LabelledPrompt(encode_text(tokenizer, text), label_ids) for text in texts]


def probabilities(logprobs: Sequence[Sequence[float]], normalize: Normalization) -> list[float]:
    """Return each label's probability in the set. normalize: `tokens` takes means, so length is no disadvantage."""
    scores = [math.fsum(each) / (len(each) if normalize == "tokens" else 1) for each in logprobs]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
