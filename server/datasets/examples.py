"""What a row of a data set may say, and the examples that it holds; how rows are stored is reading's matter.

    ChatRow          {"messages": [...]}                       an example for each assistant turn that answers something
    CompletionRow    {"prompt", "completion"}                  one example
    InstructionRow   {"instruction", "input"?, "output"}       one example; Alpaca's fields

A field that a row does not know is refused, in every format: a typing error is an answer and not silence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from reftserve.client.schemas import ChatMessage, Request
from reftserve.server.datasets.json_rows import parse_json
from reftserve.server.datasets.source_location import SourceLocation
from reftserve.server.errors import field_path

KINDS = "messages, or prompt and completion, or instruction, input (optional) and output"


@dataclass(frozen=True)
class Instruction:
    """What Alpaca's rows ask; what prompt that makes depends on the base. input: "" when there is none."""

    instruction: str
    input: str


@dataclass(frozen=True)
class Example:
    """What is asked, and the text to learn as its answer. place: its row; the turns of a conversation share one."""

    place: SourceLocation
    prompt: tuple[ChatMessage, ...] | str | Instruction
    target: str


class TrainingMessage(ChatMessage):
    """A turn of a chat. weight: 0 keeps an assistant's turn from being learned, as in OpenAI's data sets."""

    weight: Literal[0, 1] | None = None


class ChatRow(Request):
    """A conversation that ends with the assistant; each of its turns is learned as the answer to all before it."""

    messages: list[TrainingMessage] = Field(min_length=2)

    def examples(self, place: SourceLocation) -> list[Example]:
        """Raises InvalidRequest when a turn is empty, or nothing is to be learned."""
        if self.messages[-1].role != "assistant":
            where = f"messages.{len(self.messages) - 1}.role"
            raise place.error(f"field {where}: {self.messages[-1].role!r}; the last message must be 'assistant'")
        examples = []
        for index, message in enumerate(self.messages):
            if message.role != "assistant":
                if message.weight is not None:
                    raise place.error(f"field messages.{index}.weight: only an assistant's message can have one")
            # One that opens the conversation answers nothing: it is context.
            elif index > 0 and message.weight != 0:
                target = _checked_target(message.text, place, f"messages.{index}.content")
                examples.append(Example(place, tuple(self.messages[:index]), target))
        if not examples:
            raise place.error("field messages: nothing to learn; every assistant message has weight 0")
        return examples


class CompletionRow(Request):
    """A text and how it goes on. Leading spaces of the completion belong to it."""

    prompt: str = Field(min_length=1)
    completion: str

    def examples(self, place: SourceLocation) -> list[Example]:
        """Raises InvalidRequest when the completion is empty."""
        return [Example(place, self.prompt, _checked_target(self.completion, place, "completion"))]


class InstructionRow(Request):
    """Something to do, on something to do it with, and the answer."""

    instruction: str = Field(min_length=1)
    input: str | None = None
    output: str

    def examples(self, place: SourceLocation) -> list[Example]:
        """Raises InvalidRequest when the output is empty."""
        target = _checked_target(self.output, place, "output")
        return [Example(place, Instruction(self.instruction, self.input or ""), target)]


Row = ChatRow | CompletionRow | InstructionRow
FIELDS = frozenset(name for kind in (ChatRow, CompletionRow, InstructionRow) for name in kind.model_fields)


def row_kind(fields: Collection[str]) -> type[Row] | None:
    """The kind of row that has such fields; None when they belong to none."""
    if "messages" in fields:
        return ChatRow
    if "prompt" in fields or "completion" in fields:
        return CompletionRow
    if "instruction" in fields or "output" in fields:
        return InstructionRow
    return None


def row_examples(row: Any, place: SourceLocation) -> list[Example]:
    """The examples of a row, given as the mapping that its file has; `messages` may be JSON, as in a cell of a table.

    Raises InvalidRequest that names the place, the field and what is right.
    """
    if not isinstance(row, dict):
        raise place.error(f"{type(row).__name__}; expected an object")
    kind = row_kind(row)
    if kind is None:
        found = ", ".join(map(repr, list(row)[:20])) or "no field"
        raise place.error(f"field messages is missing: found {found}; expected {KINDS}")
    if isinstance(row.get("messages"), str):
        row = {**row, "messages": parse_json(row["messages"], place, "field messages: ")}
    try:
        parsed = kind.model_validate(row)
    except ValidationError as cause:
        first = cause.errors()[0]
        raise place.error(f"field {field_path(first['loc'], row)}: {first['msg']}") from cause
    return parsed.examples(place)


def _checked_target(text: str, place: SourceLocation, field: str) -> str:
    if not text.strip():
        raise place.error(f"field {field}: empty answer: there is nothing to learn")
    return text
