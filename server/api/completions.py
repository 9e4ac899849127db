"""POST /v1/completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import Completion, CompletionChoice, CompletionRequest
from reftserve.server.api.body_route import BodyRoute
from reftserve.server.api.dependencies import ClientName, Inference, Owner
from reftserve.server.api.logprobs import TextLogprobs, joined
from reftserve.server.api.openapi import EVENTS
from reftserve.server.api.sse import event_stream, unless_disconnected
from reftserve.server.base.folder import Base
from reftserve.server.base.prompts import encode_text
from reftserve.server.errors import InvalidRequest
from reftserve.server.inference.generation import Generation, Piece, UsageMeter
from reftserve.server.inference.service import InferenceService

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter(tags=["generation"], route_class=BodyRoute)


@router.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def create_completion(
    body: CompletionRequest, request: Request, inference: Inference, owner: Owner, client: ClientName
) -> Response | Completion:
    """Continue a text, with the base or an intervention."""
    given = _prompts(body)
    context = await inference.open(owner, client, body, num_sequences=len(given) * (body.n or 1))
    prompts = await run_in_threadpool(_encode, inference, given)
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    generation = await inference.prepare(
        context, body, prompts, id_prefix="cmpl", prompt_field="prompt", max_tokens=limit
    )
    if body.stream:
        return event_stream(_chunks(inference, body, generation))
    return await unless_disconnected(request, _complete(inference, body, generation))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, each a text or token ids."""
    prompt = body.prompt
    given: list[str | list[int]]
    if isinstance(prompt, str):
        given = [prompt]
    elif prompt and isinstance(prompt[0], int):
        given = [[token for token in prompt if isinstance(token, int)]]
    else:
        given = [item for item in prompt if isinstance(item, (str, list))]
    if not given:
        raise InvalidRequest("no prompt is given", param="prompt")
    return given


def _encode(inference: InferenceService, given: list[str | list[int]]) -> list[list[int]]:
    for item in given:
        if isinstance(item, str):
            inference.check_characters(len(item), "prompt")
    return [encode_text(inference.base.tokenizer, item) if isinstance(item, str) else item for item in given]


class _Choices:
    """Builds the choices piece by piece; with `echo` each begins with its prompt."""

    def __init__(self, base: Base, body: CompletionRequest, generation: Generation) -> None:
        self._base, self._body, self._generation = base, body, generation
        self._logprobs = [TextLogprobs(base) for _ in generation.params]
        self._begun: set[int] = set()

    def add(self, piece: Piece) -> CompletionChoice:
        text, logprobs = piece.text, []
        if self._body.echo and piece.index not in self._begun:
            self._begun.add(piece.index)
            prompt = self._generation.prompt_of(piece.index)
            text = self._base.tokenizer.decode(prompt) + text
            if self._body.logprobs is not None:
                logprobs.append(self._logprobs[piece.index].start(prompt[0]))
        if self._body.logprobs is not None:
            logprobs.append(self._logprobs[piece.index].add([*piece.prompt_logprobs, *piece.logprobs]))
        return CompletionChoice(
            index=piece.index,
            text=text,
            finish_reason=piece.finish_reason,
            logprobs=joined(logprobs) if logprobs else None,
        )


async def _complete(inference: InferenceService, body: CompletionRequest, generation: Generation) -> Completion:
    answers, usage = await inference.collect(generation)
    choices = _Choices(inference.base, body, generation)
    return Completion(
        id=generation.id,
        created=generation.created,
        model=body.model,
        choices=[choices.add(answer) for answer in answers],
        usage=usage,
    )


async def _chunks(
    inference: InferenceService, body: CompletionRequest, generation: Generation
) -> AsyncGenerator[Completion]:
    meter, choices = UsageMeter(generation), _Choices(inference.base, body, generation)

    def chunk(choices: list[CompletionChoice]) -> Completion:
        usage = meter.usage if body.usage_in_chunks else None
        return Completion(id=generation.id, created=generation.created, model=body.model, choices=choices, usage=usage)

    async with aclosing(inference.stream(generation)) as pieces:
        async for piece in pieces:
            meter.add(piece)
            choice = choices.add(piece)
            if choice.text or choice.finish_reason or choice.logprobs:
                yield chunk([choice])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield chunk([]).model_copy(update={"usage": meter.usage})
