"""POST /v1/chat/completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from reftserve.client.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChunkChoice,
    Delta,
)
from reftserve.server.api.body_route import BodyRoute
from reftserve.server.api.dependencies import ClientName, Inference, Owner
from reftserve.server.api.logprobs import chat_logprobs
from reftserve.server.api.openapi import EVENTS
from reftserve.server.api.sse import event_stream, unless_disconnected
from reftserve.server.errors import InvalidRequest
from reftserve.server.inference.generation import Generation, UsageMeter
from reftserve.server.inference.service import InferenceService

router = APIRouter(tags=["generation"], route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, inference: Inference, owner: Owner, client: ClientName
) -> Response | ChatCompletion:
    """Generate the next turn of a conversation, with the base or an intervention."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("give max_completion_tokens or max_tokens, not both", param="max_tokens")
    context = await inference.open(owner, client, body, num_sequences=body.n or 1)
    prompt = await inference.chat_prompt(body.messages)
    limit = body.max_completion_tokens or body.max_tokens
    generation = await inference.prepare(
        context, body, [prompt], id_prefix="chatcmpl", prompt_field="messages", max_tokens=limit
    )
    if body.stream:
        return event_stream(_chunks(inference, body, generation))
    return await unless_disconnected(request, _complete(inference, body, generation))


async def _complete(inference: InferenceService, body: ChatCompletionRequest, generation: Generation) -> ChatCompletion:
    answers, usage = await inference.collect(generation)
    choices = [
        ChatChoice(
            index=answer.index,
            message=AssistantMessage(content=answer.text),
            finish_reason=answer.finish_reason,
            logprobs=chat_logprobs(inference.base, answer.logprobs) if body.logprobs else None,
        )
        for answer in answers
    ]
    return ChatCompletion(id=generation.id, created=generation.created, model=body.model, choices=choices, usage=usage)


async def _chunks(
    inference: InferenceService, body: ChatCompletionRequest, generation: Generation
) -> AsyncGenerator[ChatCompletionChunk]:
    meter = UsageMeter(generation)

    def chunk(choices: list[ChunkChoice]) -> ChatCompletionChunk:
        usage = meter.usage if body.usage_in_chunks else None
        return ChatCompletionChunk(
            id=generation.id, created=generation.created, model=body.model, choices=choices, usage=usage
        )

    for index in range(generation.n):
        yield chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])
    async with aclosing(inference.stream(generation)) as pieces:
        async for piece in pieces:
            meter.add(piece)
            if piece.text or piece.logprobs:
                logprobs = chat_logprobs(inference.base, piece.logprobs) if body.logprobs else None
                yield chunk([ChunkChoice(index=piece.index, delta=Delta(content=piece.text), logprobs=logprobs)])
            if piece.finish_reason:
                yield chunk([ChunkChoice(index=piece.index, delta=Delta(), finish_reason=piece.finish_reason)])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield chunk([]).model_copy(update={"usage": meter.usage})
