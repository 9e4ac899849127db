"""The door to the engine: check and prepare a request, stream its answers, score texts.

    open      admission, names -> immutable versions (RequestContext)
    prepare   sampling, grammar, prompt -> Generation
    stream    pin versions -> submit n sequences -> detokenise -> pieces;   collect: the same, whole
    score     pin versions -> submit prompts with continuations -> log-probabilities
    complete  the greedy answer to one prompt, for evaluations

Token ids and lengths of all prompts and continuations are checked here, once, for every endpoint and for evaluations.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import (
    ChatMessage,
    ClassifyRequest,
    FinishReason,
    GenerationFields,
    Usage,
)
from reftserve.server.base.folder import Base
from reftserve.server.base.prompts import encode_rendered, render_chat
from reftserve.server.engine.engine_errors import EngineDied
from reftserve.server.engine.messages import InterventionRef, Ready, SamplingParams, Submit, TokenOutput
from reftserve.server.errors import DeadlineExceeded, EngineFailed, InvalidRequest, ServerError, Unavailable
from reftserve.server.inference.admission import Admission
from reftserve.server.inference.answer_queue import AnswerQueue
from reftserve.server.inference.detokenizer import Detokenizer
from reftserve.server.inference.engine import InferenceEngine
from reftserve.server.inference.generation import (
    Generation,
    Piece,
    RequestContext,
    ScoredPrompt,
    UsageMeter,
    join_pieces,
)
from reftserve.server.inference.labels import LabelledPrompt
from reftserve.server.inference.metrics import Metrics
from reftserve.server.inference.sampling import check_sampling, sampling_params
from reftserve.server.inference.structured_outputs import grammar_of
from reftserve.server.registry.composition import pinned, resolve_composition
from reftserve.server.registry.intervention_registry import InterventionRegistry

RETRY_AFTER_S = 1.0
MIN_LONGEST_TOKEN = 16  # characters; some tokenizers drop white space
DRAIN_POLL_S = 0.05
STOPPING = "the server is stopping"
T = TypeVar("T")


@dataclass(frozen=True)
class InferenceLimits:
    """max_queue: requests in the engine at once. max_wait_s: the longest expected wait. The others: of one request."""

    max_queue: int
    max_wait_s: float
    max_interventions: int
    max_stop_strings: int


class InferenceService:
    """Serves one base model through one engine."""

    def __init__(
        self,
        engine: InferenceEngine,
        base: Base,
        registry: InterventionRegistry,
        metrics: Metrics,
        limits: InferenceLimits,
    ) -> None:
        self.base = base
        self._engine = engine
        self._registry = registry
        self._metrics = metrics
        self._limits = limits
        self._admission = Admission(max_queue=limits.max_queue, max_wait_s=limits.max_wait_s)
        self._is_stopping = self._is_drained = False

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._engine.is_alive and not self._is_stopping

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests; let those in the engine end, and fail them with Unavailable after `grace_s` seconds."""
        self._is_stopping = True
        until = time.monotonic() + grace_s
        while self._engine.num_requests + self._admission.num_reserved and time.monotonic() < until:
            await asyncio.sleep(DRAIN_POLL_S)
        self._is_drained = True
        self._engine.end_requests(STOPPING)

    async def chat_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Render a conversation with the chat template and encode it. Raises InvalidRequest if the template refuses."""

        def encode() -> list[int]:
            self.check_characters(sum(len(message.text) for message in messages), "messages")
            return encode_rendered(self.base.tokenizer, render_chat(self.base.tokenizer, messages))

        return await run_in_threadpool(encode)

    def check_characters(self, characters: int, field: str) -> None:
        """Raise InvalidRequest for a text that no tokens within the context can make, before anybody encodes it."""
        max_context = self._ready().max_context
        most = max_context * max(self.base.tokenizer.longest_token, MIN_LONGEST_TOKEN)
        if characters > most:
            raise InvalidRequest(
                f"field {field!r} has {characters} characters; the context is {max_context} tokens, which is less than "
                f"{most} characters of any text",
                param=field,
                code="context_length_exceeded",
            )

    async def open(
        self, owner: str, client: str, request: GenerationFields | ClassifyRequest, *, num_sequences: int
    ) -> RequestContext:
        """Reserve places and resolve interventions, before prompts are encoded.

        Raises Unavailable, Overloaded, NotFound or InvalidRequest.
        """
        reservation = self._admission.reserve(client, num_sequences, self._ready(), self._engine.stats)
        versions = await run_in_threadpool(
            resolve_composition,
            self._registry,
            owner,
            request.model,
            request.interventions,
            base=self.base.name,
            limit=self._limits.max_interventions,
        )
        salt = cache_salt(owner, request.cache_salt)
        return RequestContext(versions, client, salt, request.priority or 0, request.timeout, reservation=reservation)

    async def prepare(
        self,
        context: RequestContext,
        request: GenerationFields,
        prompts: list[list[int]],
        *,
        id_prefix: str,
        prompt_field: str,
        max_tokens: int | None,
    ) -> Generation:
        """Check a request against the server's state. Raises InvalidRequest or Unavailable. context: `open`'s.

        max_tokens: None fills the context. prompt_field: the field that errors about the prompt name.
        """
        n = request.n or 1
        check_sampling(request, self.base, self._limits.max_stop_strings)
        grammar = await run_in_threadpool(grammar_of, request)
        params = []
        for prompt in prompts:
            self._check_tokens(prompt, prompt_field)
            room = self._check_length(prompt, 1 if max_tokens is None else max_tokens, prompt_field, "max_tokens")
            budget = room if max_tokens is None else max_tokens
            params += [
                sampling_params(request, self.base.eos_token_ids, max_tokens=budget, answer=answer, grammar=grammar)
                for answer in range(n)
            ]
        return Generation(
            id=f"{id_prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            context=context,
            prompts=prompts,
            n=n,
            stops=request.stops,
            params=params,
        )

    async def stream(self, generation: Generation) -> AsyncGenerator[Piece]:
        """Yield pieces of all answers as they come. Closing the iterator cancels the answers that still run.

        Raises Unavailable when the engine dies, InvalidRequest when it refuses, DeadlineExceeded, and as `pinned` does.
        """
        context = generation.context
        with self.pinned(context), self._metrics.request(is_metered=context.is_metered) as metered:
            queue = AnswerQueue(len(generation.params), lambda index: self._answer(generation, index))
            async with queue, contextlib.aclosing(queue.pieces()) as pieces:
                async for piece in pieces:
                    metered.first_token()
                    yield piece

    async def collect(self, generation: Generation) -> tuple[list[Piece], Usage]:
        """Return each answer as one piece, and the tokens that they cost. Raises as `stream` does."""
        meter = UsageMeter(generation)
        answers: list[list[Piece]] = [[] for _ in generation.params]
        async with contextlib.aclosing(self.stream(generation)) as pieces:
            async for piece in pieces:
                meter.add(piece)
                answers[piece.index].append(piece)
        return [join_pieces(pieces) for pieces in answers], meter.usage

    async def score(
        self, context: RequestContext, request_id: str, prompts: Sequence[LabelledPrompt], *, prompt_field: str
    ) -> list[ScoredPrompt]:
        """Return how likely each continuation of each prompt is; a prompt is computed once. Raises as `stream` does."""
        for prompt in prompts:
            for token_ids in (prompt.prompt_ids, *prompt.label_ids):
                self._check_tokens(token_ids, prompt_field)
            self._check_length(prompt.prompt_ids, max(map(len, prompt.label_ids)), prompt_field)
        submits = [
            self._submit(
                context,
                f"{request_id}-{index}",
                prompt.prompt_ids,
                SamplingParams(max_tokens=0),
                continuations=prompt.label_ids,
                sibling=index,
            )
            for index, prompt in enumerate(prompts)
        ]
        with self.pinned(context), self._metrics.request(is_metered=context.is_metered):
            outputs = await _together(self._last_output(context, submit) for submit in submits)
        return [ScoredPrompt(output.continuation_logprobs, output.cached_tokens) for output in outputs]

    async def complete(self, context: RequestContext, request_id: str, prompt: list[int], *, max_tokens: int) -> str:
        """Return the greedy answer to a prompt: at most `max_tokens`, or what fits. Raises as `stream` does."""
        self._check_tokens(prompt, "prompt")
        room = self._check_length(prompt, 1, "prompt")
        sampling = SamplingParams(max_tokens=min(max_tokens, room), stop_token_ids=self.base.eos_token_ids)
        generation = Generation(
            id=request_id, created=int(time.time()), context=context, prompts=[prompt], n=1, stops=[], params=[sampling]
        )
        [answer], _ = await self.collect(generation)
        return answer.text

    def pinned(self, context: RequestContext) -> AbstractContextManager[None]:
        """Keep the versions' files while inside. Raises NotFound when one has been deleted since it was resolved."""
        return pinned(self._registry, context.versions)

    def _ready(self, *, has_begun: bool = False) -> Ready:
        """Return the engine's sizes. has_begun: the request was there before the server began to stop."""
        if self._is_drained or (self._is_stopping and not has_begun):
            raise Unavailable(STOPPING, code="server_stopping", retry_after_s=RETRY_AFTER_S)
        if self._engine.ready is None:
            raise Unavailable("the engine is not ready", retry_after_s=RETRY_AFTER_S)
        return self._engine.ready

    def _check_tokens(self, token_ids: list[int], field: str) -> None:
        if not token_ids:
            raise InvalidRequest(f"field {field!r} has no tokens", param=field, code="empty_prompt")
        vocabulary = self.base.fingerprint.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocabulary:
            wrong = next(token for token in token_ids if not 0 <= token < vocabulary)
            raise InvalidRequest(f"token id {wrong}; the base model has 0 to {vocabulary - 1}", param=field)

    def _check_length(self, prompt: list[int], wanted: int, field: str, answer_field: str | None = None) -> int:
        """Return how many tokens may follow the prompt. answer_field: the request's field that sets `wanted`."""
        max_context = self._ready().max_context
        room = max_context - len(prompt)
        if room < wanted:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens and {wanted} are to follow; together they may have at most "
                f"{max_context}, the base model's context or, if that is less, what the KV cache holds",
                param=answer_field if answer_field and room > 0 else field,
                code="context_length_exceeded",
            )
        return room

    def _submit(
        self,
        context: RequestContext,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParams,
        continuations: list[list[int]] | None = None,
        sibling: int = 0,
    ) -> Submit:
        refs = tuple(InterventionRef(str(v.folder), v.row.content_hash, scale) for v, scale in context.versions)
        return Submit(
            request_id=request_id,
            prompt_ids=prompt,
            sampling=sampling,
            interventions=refs,
            cache_salt=context.cache_salt,
            priority=context.priority,
            timeout_s=context.timeout_s,
            continuations=continuations or [],
            client=context.client,
            sibling=sibling,
        )

    async def _outputs(self, context: RequestContext, submit: Submit) -> AsyncGenerator[TokenOutput]:
        """Yield the engine's outputs, its failures as the server's errors."""
        self._ready(has_begun=True)
        is_counted = context.is_metered
        tracked = self._admission.track(submit, context.reservation) if is_counted else contextlib.nullcontext()
        try:
            with tracked as advance:
                async with contextlib.aclosing(self._engine.generate(submit)) as outputs:
                    async for output in outputs:
                        if output.error is not None:
                            raise _server_error(output)
                        if advance is not None:
                            advance(output)
                        yield output
        except EngineDied as cause:
            if cause.was_running:
                message = f"{cause} while it computed this request, which may be the cause"
                raise EngineFailed(message, code="engine_died") from cause
            raise Unavailable(str(cause), code="engine_died", retry_after_s=RETRY_AFTER_S) from cause

    async def _last_output(self, context: RequestContext, submit: Submit) -> TokenOutput:
        async with contextlib.aclosing(self._outputs(context, submit)) as outputs:
            return [output async for output in outputs][-1]

    async def _answer(self, generation: Generation, index: int) -> AsyncGenerator[Piece]:
        params = generation.params[index]
        prompt = generation.prompt_of(index)
        submit = self._submit(generation.context, f"{generation.id}-{index}", prompt, params, sibling=index)
        # The token that ends the turn is counted, never shown.
        detokenizer = Detokenizer(
            self.base.tokenizer,
            generation.stops,
            prompt_ids=prompt,
            hidden_token_ids=params.stop_token_ids,
            min_tokens=params.min_tokens,
        )
        async with contextlib.aclosing(self._outputs(generation.context, submit)) as outputs:
            async for output in outputs:
                text = detokenizer.add(output.token_ids, last=output.finish_reason is not None)
                reason: FinishReason | None = None
                if detokenizer.stopped:
                    reason = "stop"
                elif output.finish_reason is not None:
                    reason = "stop" if output.finish_reason == "stop" else "length"
                if text or reason or output.token_ids:
                    yield Piece(
                        index=index,
                        text=text,
                        tokens=len(output.token_ids),
                        finish_reason=reason,
                        cached_tokens=output.cached_tokens,
                        logprobs=[entry for entry in output.logprobs if entry.token_id not in params.stop_token_ids],
                        prompt_logprobs=output.prompt_logprobs,
                    )
                if reason:
                    return


def cache_salt(owner: str, wanted: str | None = None) -> str:
    """Salt an owner's cached prefixes. Owners never share them: timing must not reveal what another owner asked."""
    return f"{owner}\0{wanted or ''}"


def _server_error(output: TokenOutput) -> ServerError:
    match output.finish_reason:
        case "timeout":
            return DeadlineExceeded(f"{output.error}; give a longer timeout, or fewer max_tokens", param="timeout")
        case "failed":
            return EngineFailed(output.error or "")
        case "stopped":
            return Unavailable(output.error or "", code="server_stopping", retry_after_s=RETRY_AFTER_S)
        case _:
            return InvalidRequest(output.error or "", code="request_refused")


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
