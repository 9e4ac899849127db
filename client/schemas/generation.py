"""/v1/chat/completions, /v1/completions and /v1/models: OpenAI's shapes, with interventions per request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from reftserve.client.schemas.base import Request, Response
from reftserve.client.schemas.bounds import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PROMPTS,
    Count,
    FreeMetadata,
    Grammar,
    Identifier,
    LogitBias,
    Number,
    Priority,
    Salt,
    Seconds,
    Seed,
    Share,
    Size,
    Stop,
    Tag,
    Text,
    TokenIds,
    at_most,
)


def _is_none(value: object) -> bool:
    return value is None


MAX_LOGPROBS = 20  # OpenAI's
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Number]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), Number]


class TextPart(Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "text_only", "a part of type {kind} is not supported; content is text only", {"kind": repr(kind[:50])}
            )
        return data


class ChatMessage(Request):
    """One turn of a chat. An assistant turn with null or absent content has an empty text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], at_most(MAX_PARTS)]
    name: Tag | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_content(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "tool":
            raise PydanticCustomError("no_tools", "tools are not supported, so no message has the role 'tool'")
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
    version: Count | Identifier | None = None
    scale: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False), Number] = 1.0


Composition = Annotated[list[InterventionUse], at_most(64)]


class TextFormat(Request):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Request):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Request):
    """A JSON schema as OpenAI wraps it. strict and name have no effect: every schema is enforced."""

    name: Tag | None = None
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Request):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Request):
    """Constraint on the answer: one of the fields. grammar: in Lark's notation. choice: the allowed answers."""

    meaningful_when_empty: ClassVar[frozenset[str]] = frozenset({"json"})  # the schema {} allows any JSON

    json_schema: dict[str, Any] | Grammar | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Annotated[list[Grammar], at_most(1024)] | None = None
    grammar: Grammar | None = None


class StreamOptions(Request):
    """Additional contents of a stream. continuous_usage_stats: usage in every chunk. include_obfuscation: no effect."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationFields(Request):
    """Fields of chat and text completions. OpenAI's clients send the last block, which no answer depends on."""

    # Defaults that clients of OpenAI and vLLM spell out; other values ask for what this server does not do.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "include_stop_str_in_output": (False,),
        "length_penalty": (1, 1.0),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "top_k": (-1,),
        "use_beam_search": (False,),
    }

    model: Identifier
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False), Number] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), Number] | None = None
    top_k: Size | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False), Number] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], at_most(256)] | None = None
    n: Annotated[int, Field(ge=1, le=128), Number] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Size | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Priority | None = None
    timeout: Seconds | None = None
    cache_salt: Salt | None = None
    interventions: Composition | None = None

    user: Tag | None = None
    metadata: FreeMetadata | None = None
    store: bool | None = None
    service_tier: Tag | None = None
    safety_identifier: Tag | None = None
    prompt_cache_key: Tag | None = None

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def stops(self) -> list[str]:
        """Return the stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatCompletionRequest(GenerationFields):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationFields.neutral,
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "continue_final_message": (False,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "tool_choice": ("none", "auto"),
    }

    messages: Annotated[list[ChatMessage], at_most(MAX_MESSAGES, at_least=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None


class CompletionRequest(GenerationFields):
    """POST /v1/completions. prompt: texts, or token ids of one or several. max_tokens: 0, with `echo`, for none."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationFields.neutral,
        "add_special_tokens": (True,),
        "best_of": (1,),
        "logprobs": (False,),
        "suffix": ("",),
    }

    prompt: (
        Text | Annotated[list[Text], at_most(MAX_PROMPTS)] | TokenIds | Annotated[list[TokenIds], at_most(MAX_PROMPTS)]
    )
    max_tokens: Size | None = None
    echo: bool = False
    logprobs: NumLogprobs | None = None


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
