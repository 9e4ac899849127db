"""/v1/classify: labels as answers, scored by log-likelihood."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from reftserve.client.schemas.base import Identifier, Request, Response
from reftserve.client.schemas.generation import ChatMessage, InterventionUse, Usage

MAX_LABELS = 1000

Label = Annotated[str, Field(min_length=1)]
Labels = Annotated[list[Label], Field(min_length=2, max_length=MAX_LABELS)]
Chat = Annotated[list[ChatMessage], Field(min_length=1)]


class ClassifyRequest(Request):
    """POST /v1/classify. Give either input, one text or several, or messages, one conversation or several.

    labels: whole assistant answers, or continuations of texts, leading space included. normalize: `tokens` compares
    labels by mean log-probability per token.
    """

    model: Identifier
    interventions: list[InterventionUse] | None = None
    input: str | list[str] | None = None
    messages: Chat | list[Chat] | None = None
    labels: Labels
    normalize: Literal["none", "tokens"] = "none"
    priority: int | None = Field(None, ge=-100, le=100)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    user: str | None = None


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
