"""Calls that run the model: completions, chats, their streams, and classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pydantic import BaseModel

from reftserve.client.calls.call import Call, given, one
from reftserve.client.schemas import ChatCompletion, ChatMessage, Classification, Completion, InterventionUse

Messages = str | Sequence[ChatMessage | Mapping[str, Any]]
Composition = Sequence[str | InterventionUse | Mapping[str, Any]]


class GenerationOptions(TypedDict, total=False):
    """How to generate. The server has a default for each absent option, and docs/http.md describes all.

    model: the base's id (default), or an intervention as `name`, `name@version` or `name@alias`. interventions: on top
    of `model`, each as `name@version`, InterventionUse or dict with a scale. logprobs: a bool for chats, a number of
    alternatives for completions. priority: lower goes first. timeout: seconds until the request fails.
    """

    model: str | None
    interventions: Composition | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    logprobs: bool | int | None
    top_logprobs: int | None
    echo: bool | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    priority: int | None
    timeout: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    n: int | None
    ignore_eos: bool | None
    cache_salt: str | None


class ClassifyOptions(TypedDict, total=False):
    """How to classify; see GenerationOptions. normalize: "tokens" compares mean log-probabilities per token."""

    model: str | None
    interventions: Composition | None
    normalize: str | None
    priority: int | None
    timeout: float | None
    cache_salt: str | None


def generate(model: str, prompt: str | Sequence[int], options: GenerationOptions) -> Call[Completion]:
    """POST /v1/completions. prompt: text or token ids."""
    body = {**_named(model, options), "prompt": prompt if isinstance(prompt, str) else list(prompt)}
    return Call("POST", "/v1/completions", one(Completion), json=body)


def chat(model: str, messages: Messages, options: GenerationOptions) -> Call[ChatCompletion]:
    """POST /v1/chat/completions. A string is one user message."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    body = {**_named(model, options), "messages": _turns(turns)}
    return Call("POST", "/v1/chat/completions", one(ChatCompletion), json=body)


def stream(
    model: str, prompt: str | Sequence[int] | None, messages: Messages | None, options: GenerationOptions
) -> Call[None]:
    """Stream the answer to a prompt or messages. Raises TypeError unless exactly one of them is given."""
    whole: Call[Any]
    if messages is not None and prompt is None:
        whole = chat(model, messages, options)
    elif prompt is not None and messages is None:
        whole = generate(model, prompt, options)
    else:
        raise TypeError("give either a prompt or messages")
    body = {**whole.json, "stream": True, "stream_options": {"include_usage": True}}
    return Call(whole.method, whole.path, lambda _: None, json=body)


def refuse_several_answers(options: GenerationOptions) -> None:
    """Raise ValueError when the options ask for more answers than one stream of text can hold."""
    n = options.get("n")
    if n is not None and n > 1:
        raise ValueError(
            f"n is {n}, but a stream holds the text of one answer; leave n out, or use generate() or chat()"
        )


def classify(
    model: str,
    text: str | Sequence[str] | None,
    messages: Sequence[Any] | None,
    labels: Sequence[str],
    options: ClassifyOptions,
) -> Call[Classification]:
    """POST /v1/classify. text: one or several. messages: one conversation or several."""
    inputs = {
        "input": text if text is None or isinstance(text, str) else list(text),
        "messages": None if messages is None else _turns(messages),
        "labels": list(labels),
    }
    body = {**_named(model, options), **given(inputs)}
    return Call("POST", "/v1/classify", one(Classification), json=body)


def composed(composition: Composition) -> list[dict[str, Any]]:
    """Return the interventions of a composition as JSON."""
    return [_use(item) for item in composition]


def _named(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    body = given(options)
    body["model"] = model
    if "interventions" in body:
        body["interventions"] = composed(body["interventions"])
    return body


def _use(item: str | InterventionUse | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(item, str):
        name, _, version = item.partition("@")
        return given({"name": name, "version": version or None})
    return item.model_dump(exclude_none=True) if isinstance(item, InterventionUse) else dict(item)


def _turns(messages: Sequence[Any]) -> list[Any]:
    return [
        turn.model_dump(exclude_none=True)
        if isinstance(turn, BaseModel)
        else dict(turn)
        if isinstance(turn, Mapping)
        else _turns(turn)
        for turn in messages
    ]
