"""The evaluation of one example: score and generate its texts at the engine, then measure each criterion.

/v1/classify uses the same `InferenceService.score`, `LabelledPrompt` and `probabilities`, with prompts from requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reftserve.client.schemas import EvalError, TestingCriterion
from reftserve.server.base.folder import Base
from reftserve.server.datasets import Example, encode
from reftserve.server.errors import InvalidRequest
from reftserve.server.evaluation.criteria import (
    ItemAnswer,
    Score,
    label_sets,
    measure,
    needs_output,
    needs_reference_logprobs,
)
from reftserve.server.inference.generation import RequestContext
from reftserve.server.inference.labels import LabelledPrompt
from reftserve.server.inference.service import InferenceService

PRIORITY = 6  # after every request that arrives within the next minute


@dataclass(frozen=True)
class RunTarget:
    """The criteria and the composition that all items of a run share. max_tokens: limit of a greedy answer."""

    run_id: str
    criteria: list[TestingCriterion]
    context: RequestContext
    max_tokens: int


@dataclass(frozen=True)
class ItemOutcome:
    """An item's scores by criterion name, or the error that prevented them. output: the greedy answer."""

    number: int
    measured: dict[str, Score] | EvalError
    output: str | None = None


@dataclass(frozen=True)
class _Question:
    """An encoded example. reference, labels (by criterion): indices into the distinct texts of `scored`."""

    scored: LabelledPrompt
    reference: int | None
    labels: dict[str, list[int]]


async def evaluate(inference: InferenceService, target: RunTarget, number: int, example: Example) -> ItemOutcome:
    """Evaluate one example; its own error becomes the outcome. Raises EngineFailed or Unavailable."""
    request_id = f"{target.run_id}-{number}"
    output: str | None = None
    logprobs: list[list[float]] = []
    try:
        question = await asyncio.to_thread(_question, inference.base, target.criteria, example)
        if question.scored.label_ids:
            [score] = await inference.score(
                target.context, f"{request_id}-scored", [question.scored], prompt_field="prompt"
            )
            logprobs = score.logprobs
        if needs_output(target.criteria):
            # Runs second: its prompt is then in the prefix cache.
            output = await inference.complete(
                target.context, f"{request_id}-answered", question.scored.prompt_ids, max_tokens=target.max_tokens
            )
    except InvalidRequest as cause:
        return ItemOutcome(number, EvalError(code=cause.code, message=cause.message))
    answer = ItemAnswer(
        reference=example.target,
        output=output or "",
        reference_logprobs=[] if question.reference is None else logprobs[question.reference],
        label_logprobs={name: [logprobs[index] for index in indices] for name, indices in question.labels.items()},
    )
    return ItemOutcome(number, {str(c.name): measure(c, answer) for c in target.criteria}, output)


def label_example(base: Base, example: Example, labels: Sequence[str]) -> LabelledPrompt:
    """Encode the example's prompt with each label as its answer."""
    encoded = [encode(base.tokenizer, replace(example, target=label)) for label in labels]
    return LabelledPrompt(list(encoded[0].prompt_ids), [list(each.completion_ids) for each in encoded])


def _question(base: Base, criteria: list[TestingCriterion], example: Example) -> _Question:
    encoded = encode(base.tokenizer, example)
    texts: dict[tuple[int, ...], int] = {}

    def index_of(token_ids: Sequence[int]) -> int:
        return texts.setdefault(tuple(token_ids), len(texts))

    reference = index_of(encoded.completion_ids) if needs_reference_logprobs(criteria) else None
    labels = {
        name: [index_of(ids) for ids in label_example(base, example, each).label_ids]
        for name, each in label_sets(criteria).items()
    }
    return _Question(LabelledPrompt(list(encoded.prompt_ids), [list(ids) for ids in texts]), reference, labels)
