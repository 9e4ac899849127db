"""Data sets: JSON Lines of chats or of prompt and completion, checked line by line, encoded, and split three ways.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

The last message must be the assistant's: it is what is learned; everything before it is the prompt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from reftserve.client.schemas import ChatMessage, Request
from reftserve.server.errors import InvalidRequest
from reftserve.server.prompts import encode_rendered, encode_text, render_answer, render_chat

MIN_EXAMPLES = 10
MAX_LINE_BYTES = 4 << 20


class ChatExample(Request):
    """A conversation whose last turn is learned."""

    messages: list[ChatMessage] = Field(min_length=2)


class CompletionExample(Request):
    """A text and how it goes on. Leading spaces of the completion belong to it."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)


Example = ChatExample | CompletionExample


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a prompt and of what should follow it, end of turn included."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Splits:
    """train changes the weights, validation selects the best of them, test scores and selects nothing."""

    train: list[EncodedExample]
    validation: list[EncodedExample]
    test: list[EncodedExample]


def read_examples(path: Path) -> list[Example]:
    """All examples of a data set.

    Raises InvalidRequest that names the line, the field and what is right.
    """
    return list(_parse_lines(path))


def count_examples(path: Path) -> int:
    """Check a data set and count its examples.

    Raises InvalidRequest that names the line, the field and what is right.
    """
    count = sum(1 for _ in _parse_lines(path))
    if count == 0:
        raise _invalid("the file is empty; expected at least one JSON object, one a line")
    return count


def dataset_hash(paths: Sequence[Path]) -> str:
    """SHA-256 over the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Token ids exactly as serving would render the prompt and produce the answer."""
    if isinstance(example, ChatExample):
        prompt = encode_rendered(tokenizer, render_chat(tokenizer, example.messages[:-1]))
        completion = encode_rendered(tokenizer, render_answer(tokenizer, example.messages))
    else:
        prompt = encode_text(tokenizer, example.prompt)
        completion = encode_rendered(tokenizer, example.completion)
        if completion[-1:] != [tokenizer.eos_token_id]:
            completion.append(tokenizer.eos_token_id)
    return EncodedExample(tuple(prompt), tuple(completion))


def split(training: Sequence[EncodedExample], validation: Sequence[EncodedExample] | None, *, seed: int) -> Splits:
    """Three disjoint parts; examples with the same prompt stay on one side.

    Without validation data, 80, 10 and 10 percent of the training data. With it, half of it selects and half scores.
    Raises InvalidRequest when there are too few examples.
    """
    if len(training) < MIN_EXAMPLES:
        raise InvalidRequest(
            f"{len(training)} training examples; at least {MIN_EXAMPLES} are needed",
            param="training_file",
            code="too_few_examples",
        )
    if validation is None:
        tenth = max(1, len(training) // 10)
        held_out, train = _take(training, 2 * tenth, seed)
        if not train:
            raise InvalidRequest(
                "the training examples share one prompt, so none can be held out",
                param="training_file",
                code="too_few_examples",
            )
    else:
        prompts = {example.prompt_ids for example in training}
        held_out, train = [e for e in validation if e.prompt_ids not in prompts], list(training)
    chosen, rest = _take(held_out, len(held_out) // 2, seed + 1)
    if not chosen or not rest:
        raise InvalidRequest(
            "too few held-out examples with prompts of their own; at least one must select and one score",
            param="training_file" if validation is None else "validation_file",
            code="too_few_examples",
        )
    return Splits(train=train, validation=chosen, test=rest)


def _take(
    examples: Sequence[EncodedExample], count: int, seed: int
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """About `count` examples chosen at random by prompt, and the rest."""
    by_prompt: defaultdict[tuple[int, ...], list[EncodedExample]] = defaultdict(list)
    for example in examples:
        by_prompt[example.prompt_ids].append(example)
    prompts = list(by_prompt)
    random.Random(seed).shuffle(prompts)  # noqa: S311 - a split, not a secret
    taken: list[EncodedExample] = []
    while prompts and len(taken) < count:
        taken += by_prompt[prompts.pop()]
    return taken, [example for prompt in prompts for example in by_prompt[prompt]]


def _parse_lines(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if len(raw) > MAX_LINE_BYTES:
                raise _invalid(f"line {number}: {len(raw)} bytes; at most {MAX_LINE_BYTES} are read", number)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as cause:
                raise _invalid(
                    f"line {number}: not UTF-8 at byte {cause.start}; save the file as UTF-8", number
                ) from cause
            if line:
                yield _parse_line(line, number)


def _parse_line(line: str, number: int) -> Example:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as cause:
        raise _invalid(f"line {number}: not JSON ({cause.msg} at column {cause.colno})", number) from cause
    if not isinstance(row, dict):
        raise _invalid(f"line {number}: {type(row).__name__}; expected an object", number)
    kind: type[Example] = CompletionExample if "prompt" in row or "completion" in row else ChatExample
    try:
        example = kind.model_validate(row)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _invalid(f"line {number}: field {where}: {first['msg']}", number) from cause
    if isinstance(example, ChatExample):
        last = example.messages[-1]
        if last.role != "assistant":
            where = f"messages.{len(example.messages) - 1}.role"
            raise _invalid(f"line {number}: field {where}: {last.role!r}; the last message must be 'assistant'", number)
        if not last.text.strip():
            raise _invalid(f"line {number}: field messages.{len(example.messages) - 1}.content: empty answer", number)
    return example


def _invalid(message: str, line: int | None = None) -> InvalidRequest:
    return InvalidRequest(message, param="file" if line is None else f"file.line.{line}", code="invalid_data")
