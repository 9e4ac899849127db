"""/v1/chat/completions, /v1/completions and /v1/models: OpenAI's shapes, with interventions per request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from reftserve.client.schemas.base import Identifier, Request, Response


def _is_none(value: object) -> bool:
    return value is None


MAX_LOGPROBS = 20  # OpenAI's


class TextPart(Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Request):
    """One turn of a chat. An assistant turn with null or absent content has an empty text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_content(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None:
            return {**data, "content": ""}
        return data

    @property
    def text(self) -> str:
        """Return the content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InterventionUse(Request):
    """An intervention in a composition. version: number or alias, `latest` when absent."""

    name: Identifier
    version: int | str | None = None
    scale: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)


class TextFormat(Request):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Request):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Request):
    """A JSON schema as OpenAI wraps it. strict and name have no effect: every schema is enforced."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Request):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Request):
    """Constraint on the answer: one of the fields. grammar: in Lark's notation. choice: the allowed answers."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None


class StreamOptions(Request):
    """Additional contents of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationFields(Request):
    """Fields of chat and text completions. OpenAI's clients send the last block, which no answer depends on."""

    model: Identifier
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, ge=-100, le=100)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    interventions: list[InterventionUse] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """Return the stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatCompletionRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class CompletionRequest(GenerationFields):
    """POST /v1/completions. prompt: texts, or token ids of one or several. max_tokens: 0, with `echo`, for none."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] | None = None
    suffix: Literal[None] = None


FinishReason = Literal["stop", "length"]


class PromptTokensDetails(Response):
    """cached_tokens: prompt tokens whose keys and values came from the prefix cache."""

    cached_tokens: int = 0


class Usage(Response):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class TopLogprob(Response):
    """A candidate token. token: its text, or `bytes:` and its byte codes if they are not valid UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer and the likeliest tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Response):
    """Log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Response):
    """Log-probabilities of a text, one entry per token. None: the first token of a prompt has no context."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AssistantMessage(Response):
    """A generated turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Response):
    """One of `n` answers."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Response):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage

    @property
    def text(self) -> str:
        """Return the first answer's text."""
        return self.choices[0].message.content


class Delta(Response):
    """Text or role that a chunk adds; absent fields are not sent."""

    role: Literal["assistant"] | None = Field(None, exclude_if=_is_none)
    content: str | None = Field(None, exclude_if=_is_none)


class ChunkChoice(Response):
    """A piece of one answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(Response):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(None, exclude_if=_is_none)


class CompletionChoice(Response):
    """One answer, or a piece of it while streaming."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(Response):
    """Response of POST /v1/completions, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, exclude_if=_is_none)

    @property
    def text(self) -> str:
        """Return the first answer's text."""
        return self.choices[0].text


class Model(Response):
    """A base model or an intervention. parent: the base's id, for interventions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = None
