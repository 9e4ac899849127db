"""Turns a request's fields into the engine's sampling parameters, with OpenAI's defaults."""

from __future__ import annotations

import secrets

from reftserve.client.schemas import ChatCompletionRequest, CompletionRequest, GenerationFields
from reftserve.server.base.folder import Base
from reftserve.server.engine.messages import SamplingParams
from reftserve.server.errors import InvalidRequest

MAX_STOP_CHARACTERS = 256


def check_sampling(request: GenerationFields, base: Base, max_stop_strings: int) -> None:
    """Check the fields against each other and against the base. Raises InvalidRequest."""
    stops = request.stops
    if len(stops) > max_stop_strings:
        raise InvalidRequest(f"{len(stops)} stop strings; at most {max_stop_strings} are allowed", param="stop")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(f"stop strings must have 1 to {MAX_STOP_CHARACTERS} characters", param="stop")
    vocabulary = base.fingerprint.vocab_size
    wrong = [token for token in request.logit_bias or () if not 0 <= token < vocabulary]
    if wrong:
        raise InvalidRequest(f"token id {wrong[0]}; expected 0 to {vocabulary - 1}", param="logit_bias")
    if isinstance(request, ChatCompletionRequest) and request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.max_tokens == 0 and not (isinstance(request, CompletionRequest) and request.echo):
        raise InvalidRequest("max_tokens is 0 without echo, so the answer would be empty", param="max_tokens")


def sampling_params(
    request: GenerationFields, eos_token_ids: tuple[int, ...], *, max_tokens: int, answer: int, grammar: str
) -> SamplingParams:
    """Return the parameters of answer number `answer`. Raises InvalidRequest when `min_tokens` is impossible."""
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}; at most {max_tokens} can be generated", param="min_tokens")
    if min_tokens and grammar:
        raise InvalidRequest(
            "min_tokens cannot be combined with structured output, whose grammar decides the end", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        # The n-th answer uses seed + n: answers to one prompt differ and are reproducible.
        seed=secrets.randbits(63) if request.seed is None else request.seed + answer,
        stop_token_ids=() if request.ignore_eos else eos_token_ids,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple((request.logit_bias or {}).items()),
        min_tokens=min_tokens,
        grammar=grammar,
        logprobs=_num_logprobs(request),
        prompt_logprobs=isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None,
    )


def _num_logprobs(request: GenerationFields) -> int | None:
    if isinstance(request, ChatCompletionRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None
