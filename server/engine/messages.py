"""The messages between the HTTP process and the engine process, as MessagePack by msgspec: nothing is unpickled.

HTTP -> engine: `Submit`, `Cancel`. Engine -> HTTP: `Fatal`, or `Ready` and a `StepOutput` per step with new tokens.
"""

from __future__ import annotations

import msgspec

from reftserve.server.base.lent_tensor import LentTensor


class InterventionRef(msgspec.Struct, frozen=True):
    """An immutable version of an intervention, as a local folder, with the scale of its edits in this request."""

    folder: str
    content_hash: str
    scale: float = 1.0


class SamplingParams(msgspec.Struct, frozen=True):
    """How to sample one request's tokens. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens.

    repetition_penalty divides or multiplies logits of tokens in prompt and answer (Keskar et al. 2019); the others are
    OpenAI's, over the answer. logit_bias: (token id, number to add). min_tokens: before it, `stop_token_ids` are
    forbidden. grammar: in llguidance's notation; "" allows any answer. logprobs: alternatives to report for each
    token, None for no report; prompt_logprobs: also for the prompt. max_tokens 0 only reads the prompt.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    grammar: str = ""
    logprobs: int | None = None
    prompt_logprobs: bool = False

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A generation request. `prompt_ids` are the final token ids, chat template and BOS included.

    cache_salt: only requests with equal salts share cached prefixes. priority: lower goes first. timeout_s: then the
    request ends with an error, in any state. continuations: non-empty texts to score after the prompt, which is
    computed once; nothing is generated and `sampling` is ignored. For edits, their tokens count as generated.
    client: `FairQueue` is fair among clients. sibling: the answer's index in a request for several.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    interventions: tuple[InterventionRef, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    continuations: list[list[int]] = []
    client: str = ""
    sibling: int = 0


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a request and free its blocks: the client disconnected, or a stop string was found."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded. max_context: tokens of prompt and answer together, limited by model and cache.

    lent: on a GPU, the base's parameters in order, valid while the engine runs (`cuda_weights.py`).
    """

    max_context: int
    device: str
    dtype: str
    max_sequences: int
    block_size: int
    lent: list[LentTensor] = []


class TokenLogprobs(msgspec.Struct, frozen=True):
    """A token's natural log-probability, before temperature and adjustments. top: (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request; the last has a `finish_reason`.

    "stop", "length"; "cancelled", "timeout"; "error": the request cannot be computed, "failed": the engine's fault.
    cached_tokens: of the prompt, the same in each output. logprobs: of the new tokens. prompt_logprobs: of all prompt
    tokens but the first, once. continuation_logprobs: of each continuation's tokens.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    continuation_logprobs: list[list[float]] = []


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges and counters after a step. full_*: seconds, and tokens, of the steps during which requests waited."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    bank_rows_used: int
    bank_rows_total: int
    steps: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
    full_s: float
    full_prompt_tokens: int
    full_generated_tokens: int


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """The outputs of one engine step."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot start: the model cannot be loaded, or memory is too small."""

    error: str


ToEngine = Submit | Cancel
FromEngine = Ready | StepOutput | Fatal
