"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import Completion, CompletionChoice, CompletionRequest
from reftserve.server.api.dependencies import Owner, Server
from reftserve.server.api.logprobs import TextLogprobs, joined
from reftserve.server.api.sse import event_stream, unless_disconnected
from reftserve.server.base.prompts import encode_text
from reftserve.server.errors import InvalidRequest
from reftserve.server.inference.generation import Generation, Piece, Tally, prepare, stream
from reftserve.server.services import Services

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 256

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", response_model=Completion)
async def create_completion(
    body: CompletionRequest, request: Request, server: Server, owner: Owner
) -> Response | Completion:
    """How a text goes on, by the base or an intervention of it."""
    prompts = await run_in_threadpool(_encode, server, body)
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    generation = await prepare(server, owner, body, prompts, prefix="cmpl", max_tokens=limit)
    if body.stream:
        return event_stream(_chunks(server, body, generation))
    return await unless_disconnected(request, _complete(server, body, generation))


def _encode(server: Services, body: CompletionRequest) -> list[list[int]]:
    prompt = body.prompt
    given: list[str | list[int]]
    if isinstance(prompt, str):
        given = [prompt]
    elif prompt and all(isinstance(token, int) for token in prompt):
        given = [[token for token in prompt if isinstance(token, int)]]
    else:
        given = [item for item in prompt if isinstance(item, (str, list))]
    if not 1 <= len(given) <= MAX_PROMPTS:
        raise InvalidRequest(f"{len(given)} prompts; expected 1 to {MAX_PROMPTS}", param="prompt")
    vocabulary = server.base.fingerprint.vocab_size
    encoded = []
    for item in given:
        ids = encode_text(server.base.tokenizer, item) if isinstance(item, str) else item
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if wrong:
            raise InvalidRequest(f"token id {wrong[0]}; expected 0 to {vocabulary - 1}", param="prompt")
        encoded.append(ids)
    return encoded


class _Choices:
    """The choices' texts and log-probabilities, piece by piece; with `echo` each begins with its prompt."""

    def __init__(self, server: Services, body: CompletionRequest, generation: Generation) -> None:
        self._server, self._body, self._generation = server, body, generation
        self._logprobs = [TextLogprobs(server.base) for _ in generation.params]
        self._begun: set[int] = set()

    def add(self, piece: Piece) -> CompletionChoice:
        """What a piece adds to its choice."""
        text, logprobs = piece.text, []
        if self._body.echo and piece.index not in self._begun:
            self._begun.add(piece.index)
            prompt = self._generation.prompts[piece.index // self._generation.n]
            text = self._server.base.tokenizer.decode(prompt) + text
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


def _tally(generation: Generation) -> Tally:
    return Tally(prompt_tokens=sum(len(prompt) for prompt in generation.prompts), n=generation.n)


async def _complete(server: Services, body: CompletionRequest, generation: Generation) -> Completion:
    tally, choices = _tally(generation), _Choices(server, body, generation)
    added: list[list[CompletionChoice]] = [[] for _ in generation.params]
    async for piece in stream(server, generation):
        tally.add(piece)
        added[piece.index].append(choices.add(piece))
    return Completion(
        id=generation.id,
        created=generation.created,
        model=body.model,
        choices=[_whole(pieces) for pieces in added],
        usage=tally.usage,
    )


def _whole(pieces: list[CompletionChoice]) -> CompletionChoice:
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return CompletionChoice(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        finish_reason=pieces[-1].finish_reason,
        logprobs=joined(logprobs) if logprobs else None,
    )


async def _chunks(server: Services, body: CompletionRequest, generation: Generation) -> AsyncGenerator[Completion]:
    def chunk(choices: list[CompletionChoice]) -> Completion:
        return Completion(id=generation.id, created=generation.created, model=body.model, choices=choices)

    tally, choices = _tally(generation), _Choices(server, body, generation)
    async with aclosing(stream(server, generation)) as pieces:
        async for piece in pieces:
            tally.add(piece)
            choice = choices.add(piece)
            if choice.text or choice.finish_reason or choice.logprobs:
                yield chunk([choice])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield chunk([]).model_copy(update={"usage": tally.usage})
