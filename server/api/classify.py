"""POST /v1/classify: the log-likelihood of each label, with one computation per prompt."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from reftserve.client.schemas import (
    ChatMessage,
    Classification,
    Classified,
    ClassifyRequest,
    PromptTokensDetails,
    Usage,
)
from reftserve.server.api.body_route import BodyRoute
from reftserve.server.api.dependencies import ClientName, Inference, Owner
from reftserve.server.api.sse import unless_disconnected
from reftserve.server.errors import InvalidRequest
from reftserve.server.inference.generation import ScoredPrompt
from reftserve.server.inference.labels import LabelledPrompt, label_chat, label_texts, probabilities
from reftserve.server.inference.service import InferenceService

MAX_PAIRS = 20_000
MAX_RENDERED = 64 << 20  # characters of all pairs
MESSAGE_CHARACTERS = 64  # that a message counts as besides its text: the template renders each one for each label

router = APIRouter(tags=["generation"], route_class=BodyRoute)


@router.post("/v1/classify")
async def classify(
    body: ClassifyRequest, request: Request, inference: Inference, owner: Owner, client: ClientName
) -> Classification:
    """Score each label as the answer to each input, with the base or an intervention."""
    context = await inference.open(owner, client, body, num_sequences=_num_inputs(body))
    prompts = await run_in_threadpool(_encode, inference, body)
    request_id = f"classify-{uuid.uuid4().hex}"
    scoring = inference.score(
        context, request_id, prompts, prompt_field="input" if body.messages is None else "messages"
    )
    scores = await unless_disconnected(request, scoring)
    return Classification(
        id=request_id,
        created=int(time.time()),
        model=body.model,
        data=[_classified(body, index, score.logprobs) for index, score in enumerate(scores)],
        usage=_usage(prompts, scores),
    )


def _num_inputs(body: ClassifyRequest) -> int:
    if body.messages is None:
        return len(body.input) if isinstance(body.input, list) else 1
    return len(_chats(body.messages))


def _encode(inference: InferenceService, body: ClassifyRequest) -> list[LabelledPrompt]:
    if (body.input is None) == (body.messages is None):
        raise InvalidRequest("give either input or messages", param="input")
    twice = next((label for label, count in Counter(body.labels).items() if count > 1), None)
    if twice is not None:
        raise InvalidRequest(f"label {twice!r} is given twice", param="labels")
    tokenizer = inference.base.tokenizer
    if body.messages is None:
        texts = [body.input] if isinstance(body.input, str) else body.input or []
        _check_pairs(len(texts), len(body.labels), "input")
        _check_texts(inference, [len(text) for text in texts], 0, body.labels, "input")
        prompts = label_texts(tokenizer, texts, body.labels)
        empty = next((index for index, prompt in enumerate(prompts) if not prompt.prompt_ids), None)
        if empty is not None:
            raise InvalidRequest(f"input {empty} has no tokens", param="input", code="empty_prompt")
        return prompts
    chats = _chats(body.messages)
    _check_pairs(len(chats), len(body.labels), "messages")
    lengths = [sum(len(message.text) for message in chat) for chat in chats]
    _check_texts(inference, lengths, sum(map(len, chats)), body.labels, "messages")
    return [label_chat(tokenizer, chat, body.labels) for chat in chats]


def _chats(messages: list[ChatMessage] | list[list[ChatMessage]]) -> list[list[ChatMessage]]:
    one = [message for message in messages if isinstance(message, ChatMessage)]
    return [one] if one else [chat for chat in messages if isinstance(chat, list)]


def _check_pairs(inputs: int, labels: int, param: str) -> None:
    if inputs * labels > MAX_PAIRS:
        raise InvalidRequest(
            f"{inputs} inputs and {labels} labels are {inputs * labels} pairs; at most {MAX_PAIRS} are scored at once",
            param=param,
        )


def _check_texts(inference: InferenceService, lengths: list[int], messages: int, labels: list[str], param: str) -> None:
    """Check characters: of each input and label for the context, and of all pairs, which are rendered one by one.

    lengths: of the inputs. messages: the number of all conversations' messages.
    """
    for length in lengths:
        inference.check_characters(length, param)
    for label in labels:
        inference.check_characters(len(label), "labels")
    inputs = sum(lengths) + messages * MESSAGE_CHARACTERS
    rendered = inputs * len(labels) + sum(map(len, labels)) * len(lengths)
    if rendered > MAX_RENDERED:
        counted = f", {MESSAGE_CHARACTERS} for each message included" if messages else ""
        raise InvalidRequest(
            f"{len(lengths)} inputs with {len(labels)} labels each have {rendered} characters{counted}; at most "
            f"{MAX_RENDERED} are scored at once",
            param=param,
        )


def _classified(body: ClassifyRequest, index: int, logprobs: list[list[float]]) -> Classified:
    probs = probabilities(logprobs, body.normalize)
    return Classified(
        index=index,
        label=body.labels[probs.index(max(probs))],
        probs=probs,
        num_classes=len(probs),
        logprobs=[math.fsum(each) for each in logprobs],
        tokens=[len(each) for each in logprobs],
    )


def _usage(prompts: list[LabelledPrompt], scores: list[ScoredPrompt]) -> Usage:
    prompt_tokens = sum(len(prompt.prompt_ids) for prompt in prompts)
    label_tokens = sum(len(ids) for prompt in prompts for ids in prompt.label_ids)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=label_tokens,
        total_tokens=prompt_tokens + label_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(score.cached_tokens for score in scores)),
    )
