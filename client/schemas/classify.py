"""/v1/classify: labels as answers, scored by log-likelihood."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from reftserve.client.schemas.base import Request, Response
from reftserve.client.schemas.bounds import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    Identifier,
    Priority,
    Salt,
    Seconds,
    Tag,
    Text,
    at_most,
)
from reftserve.client.schemas.generation import ChatMessage, Composition, Usage

MAX_LABELS = 1000

Label = Annotated[str, Field(min_length=1, max_length=64 << 10)]
Labels = Annotated[list[Label], at_most(MAX_LABELS, at_least=2)]
Chat = Annotated[list[ChatMessage], at_most(MAX_MESSAGES, at_least=1)]


class ClassifyRequest(Request):
    """POST /v1/classify. Give either input, one text or several, or messages, one conversation or several.

    labels: whole assistant answers, or continuations of texts, leading space included. normalize: `tokens` compares
    labels by mean log-probability per token.
    """

    model: Identifier
    interventions: Composition | None = None
    input: Text | Annotated[list[Text], at_most(MAX_PROMPTS)] | None = None
    messages: Chat | Annotated[list[Chat], at_most(MAX_PROMPTS)] | None = None
    labels: Labels
    normalize: Literal["none", "tokens"] = "none"
    priority: Priority | None = None
    timeout: Seconds | None = None
    cache_salt: Salt | None = None
    user: Tag | None = None


class Classified(Response):
    """Scores of one input, in the order of the request's labels. label: the likeliest.

    probs: sum to 1. logprobs: log-likelihoods, not normalized. tokens: lengths, end of turn included.
    """

    index: int
    label: str
    probs: list[float]
    num_classes: int
    logprobs: list[float]
    tokens: list[int]


class Classification(Response):
    """Response of POST /v1/classify; `data` is in the order of the inputs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage

    @property
    def label(self) -> str:
        """Return the first input's likeliest label."""
        return self.data[0].label
