"""What crosses the boundary between the HTTP process and the engine process: plain typed messages.

Encoded as MessagePack by msgspec (nothing is ever unpickled). HTTP -> engine: `Submit`, `Cancel`. Engine -> HTTP:
`Ready` once, then one `StepOutput` a step with the tokens of every request that got one, or `Fatal`.
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
    """How one request's tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in.

    Penalties: `repetition` divides or multiplies logits of tokens in prompt and answer (Keskar et al. 2019), `presence`
    and `frequency` are OpenAI's, over the answer. logit_bias: (token id, what is added to its logit).
    min_tokens: before so many tokens none of `stop_token_ids` is chosen. grammar: what the answer must be, in
    llguidance's notation; "" is anything. logprobs: how many alternatives to report for each token, None no report;
    prompt_logprobs: report on the prompt's tokens too. max_tokens 0 only reads the prompt.
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
        """Whether tokens that were there before count for or against themselves."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A generation request. `prompt_ids` are the final token ids, chat template and BOS included.

    cache_salt: prefixes in the cache are shared only among requests with equal salts. priority: lower goes first.
    timeout_s: after so long the request ends with an error, wherever it is. continuations: texts after the prompt, none
    empty. With them nothing is generated and `sampling` plays no part: the answer says how likely each of them is, the
    prompt computed once. Their tokens are `generated` ones for edits, not the prompt's.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    interventions: tuple[InterventionRef, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    continuations: list[list[int]] = []


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The client went away, or a stop string was found: free everything the request holds."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded.

    max_context: tokens that prompt and answer may have together: the model's context, or less if the cache holds less.
    lent: the base's parameters in their order, on a GPU; for as long as the engine lives (`cuda_weights.py`).
    """

    max_context: int
    device: str
    dtype: str
    lent: list[LentTensor] = []


class TokenLogprobs(msgspec.Struct, frozen=True):
    """How likely the model found a token, natural logarithm, before temperature and all else that the request asks.

    top: the likeliest tokens in its place, best first, (token id, log-probability).
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request; `finish_reason` is "stop", "length", "cancelled", "timeout" or "error" on its last.

    cached_tokens: prompt tokens found in the prefix cache; the same in all of a request's outputs.
    logprobs: of the new tokens, when asked for. prompt_logprobs: of all prompt tokens but the first, once.
    continuation_logprobs: of each token of each of the request's continuations.
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
    """Gauges after a step."""

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


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """Everything one engine step produced."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on (model not loadable, out of memory at start-up)."""

    error: str


ToEngine = Submit | Cancel
FromEngine = Ready | StepOutput | Fatal
