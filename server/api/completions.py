"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import Completion, CompletionChoice, CompletionRequest
from reftserve.server.api.dependencies import Owner, Server
from reftserve.server.api.generation import Generation, Tally, prepare, stream
from reftserve.server.api.sse import event_stream, unless_disconnected
from reftserve.server.errors import InvalidRequest
from reftserve.server.prompts import encode_text
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
    limit = body.max_tokens or DEFAULT_MAX_TOKENS
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


def _prompt_text(server: Services, generation: Generation, index: int) -> str:
    """What `echo` puts before the answer."""
    text: str = server.base.tokenizer.decode(generation.prompts[index // generation.n])
    return text


def _tally(generation: Generation) -> Tally:
    return Tally(prompt_tokens=sum(len(prompt) for prompt in generation.prompts), n=generation.n)


async def _complete(server: Services, body: CompletionRequest, generation: Generation) -> Completion:
    tally = _tally(generation)
    async for piece in stream(server, generation):
        tally.add(piece)
    choices = [
        CompletionChoice(
            index=index,
            text=(_prompt_text(server, generation, index) if body.echo else "") + tally.text(index),
            finish_reason=tally.reasons[index],
        )
        for index in range(len(generation.params))
    ]
    return Completion(
        id=generation.id, created=generation.created, model=body.model, choices=choices, usage=tally.usage
    )


async def _chunks(server: Services, body: CompletionRequest, generation: Generation) -> AsyncGenerator[Completion]:
    def chunk(choices: list[CompletionChoice]) -> Completion:
        return Completion(id=generation.id, created=generation.created, model=body.model, choices=choices)

    tally = _tally(generation)
    if body.echo:
        for index in range(len(generation.params)):
            yield chunk([CompletionChoice(index=index, text=_prompt_text(server, generation, index))])
    async with aclosing(stream(server, generation)) as pieces:
        async for piece in pieces:
            tally.add(piece)
            if piece.text or piece.finish_reason:
                yield chunk([CompletionChoice(index=piece.index, text=piece.text, finish_reason=piece.finish_reason)])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield chunk([]).model_copy(update={"usage": tally.usage})
