"""Rows of a data set and the examples that they hold. `reading` parses the file formats.

    ChatRow          {"messages": [...]}                       one example for each assistant turn but a first message
    CompletionRow    {"prompt", "completion"}                  one example
    InstructionRow   {"instruction", "input"?, "output"}       one example; Alpaca's fields

Every format refuses unknown fields, so that a misspelt field is not ignored.
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
    """The task of an Alpaca row; `encoding` renders it for the base. input: "" when there is none."""

    instruction: str
    input: str


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn. location: its row, which all turns of a conversation share."""

    location: SourceLocation
    prompt: tuple[ChatMessage, ...] | str | Instruction
    target: str


class TrainingMessage(ChatMessage):
    """A turn of a chat. weight: 0 excludes an assistant's turn from training, as in OpenAI's data sets."""

    weight: Literal[0, 1] | None = None


class ChatRow(Request):
    """A conversation that ends with the assistant. Each assistant turn is learned as the answer to the turns before."""

    messages: list[TrainingMessage] = Field(min_length=2)

    def examples(self, location: SourceLocation) -> list[Example]:
        """Return an example for each turn to learn. Raises InvalidRequest for an empty turn, or when there is none."""
        if self.messages[-1].role != "assistant":
            last = f"messages.{len(self.messages) - 1}.role"
            raise location.error(f"field {last}: {self.messages[-1].role!r}; the last message must be 'assistant'")
        examples = []
        for index, message in enumerate(self.messages):
            if message.role != "assistant":
                if message.weight is not None:
                    raise location.error(f"field messages.{index}.weight: only assistant messages can have a weight")
            # A first message answers nothing: it is context.
            elif index > 0 and message.weight != 0:
                target = _checked_target(message.text, location, f"messages.{index}.content")
                examples.append(Example(location, tuple(self.messages[:index]), target))
        if not examples:
            raise location.error("field messages: nothing to learn; every assistant message has weight 0")
        return examples


class CompletionRow(Request):
    """A text and its continuation, which includes its leading spaces."""

    prompt: str = Field(min_length=1)
    completion: str

    def examples(self, location: SourceLocation) -> list[Example]:
        """Return the example. Raises InvalidRequest when the completion is empty."""
        return [Example(location, self.prompt, _checked_target(self.completion, location, "completion"))]


class InstructionRow(Request):
    """An instruction, an optional input, and the answer."""

    instruction: str = Field(min_length=1)
    input: str | None = None
    output: str

    def examples(self, location: SourceLocation) -> list[Example]:
        """Return the example. Raises InvalidRequest when the output is empty."""
        target = _checked_target(self.output, location, "output")
        return [Example(location, Instruction(self.instruction, self.input or ""), target)]


Row = ChatRow | CompletionRow | InstructionRow
FIELDS = frozenset(name for kind in (ChatRow, CompletionRow, InstructionRow) for name in kind.model_fields)


def row_kind(fields: Collection[str]) -> type[Row] | None:
    """Return the kind of row with these fields; None when no kind has them."""
    if "messages" in fields:
        return ChatRow
    if "prompt" in fields or "completion" in fields:
        return CompletionRow
    if "instruction" in fields or "output" in fields:
        return InstructionRow
    return None


def row_examples(row: Any, location: SourceLocation) -> list[Example]:
    """Return a row's examples; `messages` may be JSON text. Raises InvalidRequest with location, field and reason."""
    if not isinstance(row, dict):
        raise location.error(f"{type(row).__name__}; expected an object")
    kind = row_kind([name for name, value in row.items() if value is not None])
    if kind is None:
        found = ", ".join(map(repr, list(row)[:20])) or "no field"
        raise location.error(f"field messages is missing: found {found}; expected {KINDS}")
    if isinstance(row.get("messages"), str):
        row = {**row, "messages": parse_json(row["messages"], location, "field messages: ")}
    try:
        parsed = kind.model_validate(row)
    except ValidationError as cause:
        first = cause.errors()[0]
        raise location.error(f"field {field_path(first['loc'], row)}: {first['msg']}") from cause
    return parsed.examples(location)


def _checked_target(text: str, location: SourceLocation, field: str) -> str:
    if not text.strip():
        raise location.error(f"field {field}: empty answer: there is nothing to learn")
    return text
