"""One example, evaluated: what the engine is asked, and what the criteria make of its answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from reftserve.client.schemas import EvalError, TestingCriterion
from reftserve.server.base.folder import Base
from reftserve.server.datasets import Example, encode
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit
from reftserve.server.errors import InvalidRequest
from reftserve.server.evaluation.criteria import (
    ItemAnswer,
    Score,
    label_sets,
    measure,
    needs_output,
    needs_reference_logprobs,
)
from reftserve.server.evaluation.examples import label_example
from reftserve.server.inference.answers import answers
from reftserve.server.inference.detokenizer import Detokenizer
from reftserve.server.inference.engine_client import EngineClient

PRIORITY = 6  # behind every request of the next minute


@dataclass(frozen=True)
class RunTarget:
    """Who is evaluated, for whom, and how: what all items of a run share. max_tokens: of a greedy answer."""

    run_id: str
    criteria: list[TestingCriterion]
    interventions: tuple[InterventionRef, ...]
    cache_salt: str
    max_tokens: int


@dataclass(frozen=True)
class ItemOutcome:
    """What became of an item: what its criteria measured by name, or why they could not. output: the greedy answer."""

    number: int
    measured: dict[str, Score] | EvalError
    output: str | None = None


@dataclass(frozen=True)
class _Question:
    """What the engine is asked: how likely texts after the prompt are, and the greedy answer, where it matters.

    reference: which of the texts is the data's answer; labels: which each label is, by the criterion's name.
    """

    submits: list[Submit]
    reference: int | None
    labels: dict[str, list[int]]


async def evaluate(engine: EngineClient, base: Base, target: RunTarget, number: int, example: Example) -> ItemOutcome:
    """An example's outcome; where the example itself is at fault, that is one too.

    Raises Unavailable when the engine dies.
    """
    try:
        question = await asyncio.to_thread(_question, base, target, number, example)
        outputs = await answers(engine, question.submits)
    except InvalidRequest as cause:
        return ItemOutcome(number, EvalError(code=cause.code, message=cause.message))
    logprobs: list[list[float]] = []
    output: str | None = None
    for submit, became in zip(question.submits, outputs, strict=True):
        if submit.continuations:
            logprobs = became.continuation_logprobs
        else:
            output = _text(base, became.token_ids)
    answered = ItemAnswer(
        reference=example.target,
        output=output or "",
        reference_logprobs=[] if question.reference is None else logprobs[question.reference],
        label_logprobs={name: [logprobs[place] for place in places] for name, places in question.labels.items()},
    )
    return ItemOutcome(number, {str(c.name): measure(c, answered) for c in target.criteria}, output)


def _question(base: Base, target: RunTarget, number: int, example: Example) -> _Question:
    encoded = encode(base.tokenizer, example)
    prompt = list(encoded.prompt_ids)
    # Texts that several criteria ask for are scored once.
    places: dict[tuple[int, ...], int] = {}

    def place(token_ids: tuple[int, ...]) -> int:
        return places.setdefault(token_ids, len(places))

    scored = place(encoded.completion_ids) if needs_reference_logprobs(target.criteria) else None
    labels = {
        name: [place(tuple(ids)) for ids in label_example(base.tokenizer, example, each).label_ids]
        for name, each in label_sets(target.criteria).items()
    }
    _check_length(prompt, max(map(len, places), default=1), base.max_context)
    submits = []
    if places:
        continuations = [list(ids) for ids in places]
        submits.append(_submit(target, f"{number}-scored", prompt, SamplingParams(max_tokens=0), continuations))
    if needs_output(target.criteria):
        max_tokens = min(target.max_tokens, base.max_context - len(prompt))
        greedy = SamplingParams(max_tokens=max_tokens, stop_token_ids=base.eos_token_ids)
        submits.append(_submit(target, f"{number}-answered", prompt, greedy, []))
    return _Question(submits, scored, labels)


def _submit(
    target: RunTarget, name: str, prompt: list[int], sampling: SamplingParams, continuations: list[list[int]]
) -> Submit:
    return Submit(
        request_id=f"{target.run_id}-{name}",
        prompt_ids=prompt,
        sampling=sampling,
        interventions=target.interventions,
        cache_salt=target.cache_salt,
        priority=PRIORITY,
        continuations=continuations,
    )


def _check_length(prompt: list[int], longest: int, max_context: int) -> None:
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", code="empty_prompt")
    if len(prompt) + longest > max_context:
        raise InvalidRequest(
            f"prompt and answer have {len(prompt)} and {longest} tokens; the base model's context is {max_context}",
            code="context_length_exceeded",
        )


def _text(base: Base, token_ids: list[int]) -> str:
    return Detokenizer(base.tokenizer, [], hidden_token_ids=base.eos_token_ids).add(token_ids, last=True)
