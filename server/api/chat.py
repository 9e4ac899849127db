"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChunkChoice,
    Delta,
)
from reftserve.server.api.dependencies import Owner, Server
from reftserve.server.api.logprobs import chat_logprobs
from reftserve.server.api.sse import event_stream, unless_disconnected
from reftserve.server.base.prompts import encode_rendered, render_chat
from reftserve.server.errors import InvalidRequest
from reftserve.server.inference.generation import Generation, Tally, prepare, stream
from reftserve.server.services import Services

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, server: Server, owner: Owner
) -> Response | ChatCompletion:
    """The next turn of a conversation, by the base or an intervention of it."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("give max_completion_tokens or max_tokens, not both", param="max_tokens")
    prompt = await run_in_threadpool(_encode, server, body)
    limit = body.max_completion_tokens or body.max_tokens
    generation = await prepare(server, owner, body, [prompt], prefix="chatcmpl", max_tokens=limit)
    if body.stream:
        return event_stream(_chunks(server, body, generation))
    return await unless_disconnected(request, _complete(server, body, generation))


def _encode(server: Services, body: ChatCompletionRequest) -> list[int]:
    return encode_rendered(server.base.tokenizer, render_chat(server.base.tokenizer, body.messages))


async def _complete(server: Services, body: ChatCompletionRequest, generation: Generation) -> ChatCompletion:
    tally = Tally(prompt_tokens=len(generation.prompts[0]), n=generation.n)
    async for piece in stream(server, generation):
        tally.add(piece)
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=tally.text(index)),
            finish_reason=tally.reasons[index],
            logprobs=chat_logprobs(server.base, tally.logprobs[index]) if body.logprobs else None,
        )
        for index in range(generation.n)
    ]
    return ChatCompletion(
        id=generation.id, created=generation.created, model=body.model, choices=choices, usage=tally.usage
    )


async def _chunks(
    server: Services, body: ChatCompletionRequest, generation: Generation
) -> AsyncGenerator[ChatCompletionChunk]:
    def chunk(choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=generation.id, created=generation.created, model=body.model, choices=choices)

    tally = Tally(prompt_tokens=len(generation.prompts[0]), n=generation.n)
    for index in range(generation.n):
        yield chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])
    async with aclosing(stream(server, generation)) as pieces:
        async for piece in pieces:
            tally.add(piece)
            if piece.text or piece.logprobs:
                logprobs = chat_logprobs(server.base, piece.logprobs) if body.logprobs else None
                yield chunk([ChunkChoice(index=piece.index, delta=Delta(content=piece.text), logprobs=logprobs)])
            if piece.finish_reason:
                yield chunk([ChunkChoice(index=piece.index, delta=Delta(), finish_reason=piece.finish_reason)])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield chunk([]).model_copy(update={"usage": tally.usage})
