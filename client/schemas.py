"""The wire types: what client and server say to each other. OpenAI's shapes; what OpenAI has no word for is native.

Requests forbid unknown fields, so that a typing error is an answer and not silence; responses ignore what they do not
know, so that an older client reads a newer server.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class Request(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Response(BaseModel):
    """Base of everything the server answers."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


T = TypeVar("T")


class Page(Response, Generic[T]):
    """OpenAI's list envelope."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


# --- Generation -----------------------------------------------------------------------------------------------------


class TextPart(Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Request):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InterventionUse(Request):
    """An intervention in a composition. version: number or alias, `latest` when absent."""

    name: str
    version: int | str | None = None
    scale: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)


class StreamOptions(Request):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationFields(Request):
    """What chat and text completions have in common.

    The last block is accepted because OpenAI's clients send it and no answer depends on it.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    interventions: list[InterventionUse] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # OpenAI's fields that would change the answer in ways the engine does not have yet: only "off" is taken.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ResponseFormat(Request):
    """Only plain text."""

    type: Literal["text"]


class ChatCompletionRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(GenerationFields):
    """POST /v1/completions. prompt: text, token ids, or several of one kind."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: Literal[None] = None
    best_of: Literal[1] | None = None
    suffix: Literal[None] = None


FinishReason = Literal["stop", "length"]


class PromptTokensDetails(Response):
    """cached_tokens: prompt tokens whose keys and values were found in the prefix cache."""

    cached_tokens: int = 0


class Usage(Response):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


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
    logprobs: None = None


class ChatCompletion(Response):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Response):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Response):
    """A piece of one answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatCompletionChunk(Response):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionChoice(Response):
    """One answer, or a piece of it while streaming."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: None = None


class Completion(Response):
    """Answer of POST /v1/completions, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(Response):
    """A base model or an intervention. parent: the base's id, for interventions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = None


# --- Files and fine-tuning ------------------------------------------------------------------------------------------


class FileObject(Response):
    """An uploaded or produced file. examples: rows of a validated data set."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"
    examples: int | None = None


class Deleted(Response):
    """Answer of DELETE."""

    id: str
    object: str
    deleted: Literal[True] = True


Auto = Literal["auto"]


class SupervisedHyperparameters(Request):
    """OpenAI's knobs; "auto" or absent leaves each to the recipe."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


class SupervisedMethod(Request):
    """The sensible recipe."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class ReftHyperparameters(Request):
    """How a LoReFT intervention is trained; what is absent the recipe decides. max_length: tokens."""

    n_epochs: int | None = Field(None, ge=1, le=1000)
    batch_size: int | None = Field(None, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, le=1)
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float | None = Field(None, ge=0, le=1)
    max_length: int | None = Field(None, ge=2)


class ReftMethod(Request):
    """What is trained; what is absent the recipe decides."""

    family: str | None = None
    layers: list[int] | Literal["all"] | None = None
    positions: str | None = None
    rank: int | None = Field(None, ge=1, le=1024)
    dropout: float | None = Field(None, ge=0, lt=1)
    tied: bool | None = None
    hyperparameters: ReftHyperparameters = ReftHyperparameters()


class Method(Request):
    """`method` of a fine-tuning job."""

    type: Literal["supervised", "reft"]
    supervised: SupervisedMethod | None = None
    reft: ReftMethod | None = None


class FineTuningJobCreate(Request):
    """POST /v1/fine_tuning/jobs. suffix: the intervention's name."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = Field(None, max_length=0)


JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class JobError(Response):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(Response):
    """A training run. fine_tuned_model: `name@version` once it is published."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str = "default"
    result_files: list[str] = []
    status: JobStatus
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    hyperparameters: dict[str, Any] = {}
    method: dict[str, Any] | None = None
    error: JobError | None = None
    seed: int
    estimated_finish: int | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] = []


class FineTuningEvent(Response):
    """Something that happened in a job; `data` has the numbers of a metrics event."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class FineTuningCheckpoint(Response):
    """A durable step of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]


# --- Interventions --------------------------------------------------------------------------------------------------


class InterventionInfo(Response):
    """A name with its versions and aliases; `latest` is one of the aliases."""

    name: str
    object: Literal["intervention"] = "intervention"
    latest: int | None
    versions: list[int]
    aliases: dict[str, int]
    created_at: int


class InterventionVersion(Response):
    """A published, immutable version."""

    id: str
    object: Literal["intervention.version"] = "intervention.version"
    name: str
    version: int
    content_hash: str
    bytes: int
    parameters: int
    manifest: dict[str, Any]
    created_at: int
    job_id: str | None = None


class AliasUpdate(Request):
    """PUT /v1/interventions/{name}/aliases/{alias}."""

    version: int = Field(ge=1)


# --- Health and errors ----------------------------------------------------------------------------------------------


class Readiness(Response):
    """GET /ready."""

    ready: bool
    model: bool
    worker: bool
    database: bool


class ErrorDetail(Response):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Response):
    """Body of every answer with a status of 400 or above."""

    error: ErrorDetail
