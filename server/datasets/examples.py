"""Examples: a prompt and the answer to learn. `rows` makes them from a data set's rows."""

from __future__ import annotations

from dataclasses import dataclass

from reftserve.server.datasets.source_location import SourceLocation


@dataclass(frozen=True)
class Turn:
    """A message of a conversation. role: `system`, `developer`, `user`, `assistant` or `tool`."""

    role: str
    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """The first `length` turns of a conversation. All examples of a conversation share its turns."""

    conversation: tuple[Turn, ...]
    length: int


@dataclass(frozen=True)
class Instruction:
    """The task of an Alpaca row; `encoding` renders it for the base. input: "" when there is none."""

    instruction: str
    input: str


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn. location: its row, which all turns of a conversation share."""

    location: SourceLocation
    prompt: ChatPrompt | str | Instruction
    target: str
