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
from reftserve.server.field_paths import field_path
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
        groups = _by_prompt(training, seed)
        # Two prompts at the least: one selects, one scores.
        held_out, rest = _take(groups, 2 * max(1, len(training) // 10), prompts=2)
        train = [example for group in rest for example in group]
    else:
        prompts = {example.prompt_ids for example in training}
        held_out = _by_prompt([e for e in validation if e.prompt_ids not in prompts], seed)
        train = list(training)
    chosen, scoring = _take(held_out, sum(map(len, held_out)) // 2, prompts=1)
    if not (train and chosen and scoring):
        needed = "three different prompts" if validation is None else "two prompts that are not in the training data"
        raise InvalidRequest(
            f"at least {needed} are needed: held-out examples, some to select and some to score, share no prompt",
            param="training_file" if validation is None else "validation_file",
            code="too_few_examples",
        )
    return Splits(
        train=train,
        validation=[example for group in chosen for example in group],
        test=[example for group in scoring for example in group],
    )


PromptGroups = list[list[EncodedExample]]


def _by_prompt(examples: Sequence[EncodedExample], seed: int) -> PromptGroups:
    """The examples of each prompt together, in random order."""
    groups: defaultdict[tuple[int, ...], list[EncodedExample]] = defaultdict(list)
    for example in examples:
        groups[example.prompt_ids].append(example)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - a split, not a secret
    return shuffled


def _take(groups: PromptGroups, count: int, *, prompts: int) -> tuple[PromptGroups, PromptGroups]:
    """The first groups, until they hold `count` examples and `prompts` prompts, though never all; and the rest."""
    taken = size = 0
    while taken < len(groups) - 1 and (size < count or taken < prompts):
        size += len(groups[taken])
        taken += 1
    return groups[:taken], groups[taken:]


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
    except RecursionError as cause:
        raise _invalid(f"line {number}: JSON that is nested too deeply", number) from cause
    if not isinstance(row, dict):
        raise _invalid(f"line {number}: {type(row).__name__}; expected an object", number)
    kind: type[Example] = CompletionExample if "prompt" in row or "completion" in row else ChatExample
    try:
        example = kind.model_validate(row)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = field_path(first["loc"], row)
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
