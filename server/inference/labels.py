"""Label sets: which of some texts a model finds likeliest as the answer to a prompt.

A label is the whole answer, its end of turn included: without it "no" would be likelier than "none" wherever that is,
as its beginning. Log-probabilities of its tokens add up to the label's; probabilities are their softmax over the set.
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
    """Token ids of a prompt, and of each label as its answer, end of turn included."""

    prompt_ids: list[int]
    label_ids: list[list[int]]


def label_chat(tokenizer: Tokenizer, messages: Sequence[ChatMessage], labels: Sequence[str]) -> LabelledPrompt:
    """A conversation, and each label as the assistant's next turn.

    Raises InvalidRequest when the base has no chat template or the template refuses the messages.
    """
    turns = [[*messages, ChatMessage(role="assistant", content=label)] for label in labels]
    return LabelledPrompt(
        encode_rendered(tokenizer, render_chat(tokenizer, messages)),
        [encode_rendered(tokenizer, render_answer(tokenizer, turn)) for turn in turns],
    )


def label_texts(tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[str]) -> list[LabelledPrompt]:
    """Plain texts, and each label as how they go on and end."""
    label_ids = [encode_completion(tokenizer, label) for label in labels]
    return [LabelledPrompt(encode_text(tokenizer, text), label_ids) for text in texts]


def probabilities(logprobs: Sequence[Sequence[float]], normalize: Normalization) -> list[float]:
    """Of each label within the set, from the log-probabilities of its tokens.

    normalize: `tokens` takes a label's mean over its tokens, so that long ones are not unlikely for being long.
    """
    scores = [math.fsum(each) / (len(each) if normalize == "tokens" else 1) for each in logprobs]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
