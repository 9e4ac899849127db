"""What chat and text completions share: from a checked request to pieces of text.

resolve model and interventions -> hold the versions -> submit n sequences -> detokenise -> pieces
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import FinishReason, GenerationFields, PromptTokensDetails, Usage
from reftserve.server.engine.engine_errors import EngineDied
from reftserve.server.engine.messages import Ready, SamplingParams, Submit, TokenLogprobs
from reftserve.server.errors import InvalidRequest, Overloaded, Unavailable
from reftserve.server.inference.answers import RETRY_AFTER_S, check_output, engine_died, intervention_refs, salted
from reftserve.server.inference.detokenizer import Detokenizer
from reftserve.server.inference.sampling import check_sampling, sampling_params
from reftserve.server.inference.structured_outputs import grammar_of
from reftserve.server.registry.composition import Composition, pinned, resolve_composition
from reftserve.server.services import Services


@dataclass(frozen=True)
class Piece:
    """Text that answer `index` goes on with, and on its last piece why it ended.

    tokens: how many made it. cached_tokens: of the prompt, found in the prefix cache. logprobs: of the tokens, but not
    of one that ends the turn; prompt_logprobs: of the prompt's tokens but the first, on the first piece.
    """

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def followed_by(self, other: Piece) -> Piece:
        """One piece of it and the next of the same answer."""
        return Piece(
            self.index,
            self.text + other.text,
            self.tokens + other.tokens,
            other.finish_reason,
            self.cached_tokens,
            self.logprobs + other.logprobs,
            self.prompt_logprobs,
        )


@dataclass(frozen=True)
class Generation:
    """A request that has been checked and may run: `prompts` in order, each answered `n` times."""

    id: str
    created: int
    prompts: list[list[int]]
    n: int
    stops: list[str]
    params: list[SamplingParams]
    versions: Composition
    cache_salt: str
    priority: int
    timeout_s: float | None


@dataclass
class Tally:
    """Counts tokens as pieces go by."""

    prompt_tokens: int
    n: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)
    answers: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Count one piece."""
        self.completion_tokens += piece.tokens
        self.cached_tokens[piece.index] = piece.cached_tokens
        self.answers.setdefault(piece.index, []).append(piece.text)
        self.logprobs.setdefault(piece.index, []).extend(piece.logprobs)
        if piece.finish_reason is not None:
            self.reasons[piece.index] = piece.finish_reason

    def text(self, index: int) -> str:
        """The whole answer."""
        return "".join(self.answers[index])

    @property
    def usage(self) -> Usage:
        """What the answer cost."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_prompt_tokens),
        )

    @property
    def _cached_prompt_tokens(self) -> int:
        # Like prompt_tokens, which counts a prompt once however many answers it gets: what its first answer found.
        return sum(tokens for index, tokens in self.cached_tokens.items() if index % self.n == 0)


async def prepare(
    services: Services,
    owner: str,
    request: GenerationFields,
    prompts: list[list[int]],
    *,
    prefix: str,
    max_tokens: int | None,
) -> Generation:
    """Check a request against the server as it is now.

    max_tokens: None fills the context. Raises NotFound, InvalidRequest, Overloaded or Unavailable.
    """
    n = request.n or 1
    ready = check_capacity(services, n * len(prompts))
    check_sampling(request, services.base, services.settings.max_stop_strings)
    grammar = await run_in_threadpool(grammar_of, request)
    versions = await run_in_threadpool(
        resolve_composition,
        services.registry,
        owner,
        request.model,
        request.interventions,
        base=services.base.name,
        limit=services.settings.max_interventions,
    )
    params = [
        sampling_params(
            request,
            services.base.eos_token_ids,
            max_tokens=_budget(prompt, max_tokens, ready.max_context),
            answer=answer,
            grammar=grammar,
        )
        for prompt in prompts
        for answer in range(n)
    ]
    generation_id = f"{prefix}-{uuid.uuid4().hex}"
    return Generation(
        generation_id,
        int(time.time()),
        prompts,
        n,
        request.stops,
        params,
        versions,
        salted(owner, request.cache_salt),
        priority=request.priority or 0,
        timeout_s=request.timeout,
    )


def check_capacity(services: Services, requests: int) -> Ready:
    """What the engine said when it was ready.

    Raises Unavailable when it is not, Overloaded when it has no room for so many requests.
    """
    ready, waiting, limit = services.engine.ready, services.engine.num_requests, services.settings.max_queue
    if ready is None:
        raise Unavailable("the engine is not ready", retry_after_s=RETRY_AFTER_S)
    if waiting + requests > limit:
        raise Overloaded(f"{waiting} requests are waiting, {limit} is the limit", retry_after_s=RETRY_AFTER_S)
    return ready


async def stream(services: Services, generation: Generation) -> AsyncGenerator[Piece]:
    """Pieces of all answers as they come. Closing the iterator cancels what still runs.

    Raises Unavailable when the engine dies, InvalidRequest when it refuses the request, DeadlineExceeded.
    """
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
    with pinned(services.registry, generation.versions):
        tasks = [
            asyncio.create_task(_answer(services, generation, index, queue)) for index in range(len(generation.params))
        ]
        began, running, first = time.monotonic(), len(tasks), True
        outcome = "cancelled"
        try:
            while running:
                for item in await _waiting(queue):
                    if isinstance(item, Exception):
                        outcome = "error"
                        raise item
                    if first:
                        services.metrics.first_token_s.observe(time.monotonic() - began)
                        first = False
                    running -= item.finish_reason is not None
                    yield item
            outcome = "finished"
        finally:
            services.metrics.requests.labels(outcome).inc()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _waiting(queue: asyncio.Queue[Piece | Exception]) -> list[Piece | Exception]:
    """What is in the queue, at least one; pieces of one answer that follow each other are one.

    Where clients or this process are slower than the engine, tokens then cost an event for several, and not each.
    """
    found = [await queue.get()]
    while not queue.empty():
        item, last = queue.get_nowait(), found[-1]
        if isinstance(item, Piece) and isinstance(last, Piece) and item.index == last.index:
            found[-1] = last.followed_by(item)
        else:
            found.append(item)
    return found


async def _answer(
    services: Services, generation: Generation, index: int, queue: asyncio.Queue[Piece | Exception]
) -> None:
    """Put one answer's pieces into the queue, and at the end a piece with a reason, or an exception."""
    params = generation.params[index]
    submit = Submit(
        request_id=f"{generation.id}-{index}",
        prompt_ids=generation.prompts[index // generation.n],
        sampling=params,
        interventions=intervention_refs(generation.versions),
        cache_salt=generation.cache_salt,
        priority=generation.priority,
        timeout_s=generation.timeout_s,
    )
    # The token that ends the turn is counted, never shown.
    detokenizer = Detokenizer(
        services.base.tokenizer,
        generation.stops,
        prompt_ids=submit.prompt_ids,
        hidden_token_ids=params.stop_token_ids,
        min_tokens=params.min_tokens,
    )
    try:
        async with contextlib.aclosing(services.engine.generate(submit)) as outputs:
            async for output in outputs:
                check_output(output)
                text = detokenizer.add(output.token_ids, last=output.finish_reason is not None)
                reason: FinishReason | None = None
                if detokenizer.stopped:
                    reason = "stop"
                elif output.finish_reason is not None:
                    reason = "stop" if output.finish_reason == "stop" else "length"
                if text or reason or output.token_ids:
                    queue.put_nowait(
                        Piece(
                            index,
                            text,
                            len(output.token_ids),
                            reason,
                            output.cached_tokens,
                            [entry for entry in output.logprobs if entry.token_id not in params.stop_token_ids],
                            output.prompt_logprobs,
                        )
                    )
                if reason:
                    return
    except EngineDied as cause:
        queue.put_nowait(engine_died(cause))
    except Exception as cause:
        # Whatever it is, the consumer must hear of it: it would wait for ever otherwise.
        queue.put_nowait(cause)


def _budget(prompt: list[int], max_tokens: int | None, max_context: int) -> int:
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt", code="empty_prompt")
    room = max_context - len(prompt)
    if room < (1 if max_tokens is None else max_tokens):
        asked = "open" if max_tokens is None else max_tokens
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and max_tokens is {asked}; together they may have at most "
            f"{max_context}, the base model's context or, if that is less, what the KV cache holds",
            param="max_tokens" if room > 0 else "messages",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens
