"""Conversations: the field `messages` of a row, and its examples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from reftserve.server.datasets.examples import ChatPrompt, Example, Turn
from reftserve.server.datasets.field_checks import (
    json_kind,
    names,
    require_text,
    shown,
    unknown_fields,
)
from reftserve.server.datasets.foreign_rows import SHAREGPT
from reftserve.server.datasets.json_rows import parse_json
from reftserve.server.datasets.limits import MAX_PARTS, MAX_PROMPTS_CHARACTERS, MAX_TURNS
from reftserve.server.datasets.source_location import SourceLocation

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "name", "weight")


def chat_examples(messages: Any, location: SourceLocation) -> list[Example]:
    """Return an example for each assistant turn to learn; all share the conversation's turns.

    messages: a list of objects, or its JSON text. A turn of weight 0 is context, as is a first message. Raises
    InvalidRequest for an invalid or empty turn, or when there is nothing to learn.
    """
    if isinstance(messages, str):
        messages = parse_json(messages, location, "field messages: ")
    if not isinstance(messages, list):
        raise location.error(f"field messages: {json_kind(messages)}; expected a list of messages")
    if not 2 <= len(messages) <= MAX_TURNS:
        raise location.error(
            f"field messages: {len(messages)} messages; a conversation has at least 2, a question and its answer, "
            f"and at most {MAX_TURNS}"
        )
    turns = tuple(_turn(message, f"messages.{index}", location) for index, message in enumerate(messages))
    if turns[-1].role != "assistant":
        raise location.error(
            f"field messages.{len(turns) - 1}.role: {turns[-1].role!r}; the last message must be 'assistant', "
            "whose answer is learned"
        )
    examples = []
    for index, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        learned = _is_learned(message.get("weight"), turn.role, f"messages.{index}.weight", location)
        # A first message answers nothing: it is context.
        if learned and index > 0:
            if not turn.text or turn.text.isspace():
                raise location.error(
                    f"field messages.{index}.content: empty answer: there is nothing to learn; weight 0 would skip it"
                )
            examples.append(Example(location, ChatPrompt(turns, index), turn.text))
    if not examples:
        raise location.error("field messages: nothing to learn; every assistant message has weight 0")
    _check_prompts(turns, examples, location)
    return examples


def _check_prompts(turns: Sequence[Turn], examples: Sequence[Example], location: SourceLocation) -> None:
    """Check the size of all prompts, which grows with the square of the conversation's length."""
    lengths = [0, *itertools.accumulate(len(turn.text) for turn in turns)]
    characters = sum(lengths[example.prompt.length] for example in examples if isinstance(example.prompt, ChatPrompt))
    if characters > MAX_PROMPTS_CHARACTERS:
        raise location.error(
            f"field messages: the prompts of its {len(examples)} answers have {characters} characters, because each "
            f"repeats the turns before it; at most {MAX_PROMPTS_CHARACTERS}: split the conversation, or give earlier "
            "answers weight 0"
        )


def _turn(message: Any, path: str, location: SourceLocation) -> Turn:
    if not isinstance(message, dict):
        raise location.error(f"field {path}: {json_kind(message)}; expected an object with role and content")
    if "from" in message and "role" not in message:
        raise location.error(f"field {path}: {SHAREGPT}")
    role = message.get("role")
    if role is None:
        raise location.error(f"field {path}.role is missing or null; expected one of {', '.join(ROLES)}")
    if role not in ROLES:
        found = repr(shown(role)) if isinstance(role, str) else json_kind(role)
        raise location.error(f"field {path}.role: {found}; expected one of {', '.join(ROLES)}")
    _check_unknown(message, path, location)
    if message.get("name") is not None:
        require_text(message["name"], f"{path}.name", location)
    content = message.get("content")
    if content is None and role != "assistant":
        raise location.error(f"field {path}.content is missing or null; expected text")
    return Turn(role, _content(content, f"{path}.content", location))


def _check_unknown(message: Mapping[str, Any], path: str, location: SourceLocation) -> None:
    unknown = unknown_fields(message, MESSAGE_FIELDS)
    if len(unknown) == 1:
        raise location.error(f"field {path}.{unknown[0]} is unknown: remove it; a message has {_expected()}")
    if unknown:
        raise location.error(f"field {path}: {names(unknown)} are unknown: remove them; a message has {_expected()}")


def _expected() -> str:
    return f"{', '.join(MESSAGE_FIELDS[:-1])} and {MESSAGE_FIELDS[-1]}; tool calls and images are not learned"


def _content(content: Any, path: str, location: SourceLocation) -> str:
    """Return the text of a message's content: null, text, or a list of text parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return require_text(content, path, location)
    if len(content) > MAX_PARTS:
        raise location.error(f"field {path}: {len(content)} parts; at most {MAX_PARTS} are read")
    return "".join(_part(part, f"{path}.{index}", location) for index, part in enumerate(content))


def _part(part: Any, path: str, location: SourceLocation) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or part.get("text") is None:
        raise location.error(f'field {path}: expected {{"type": "text", "text": ...}}; only text is learned')
    if unknown := unknown_fields(part, ("type", "text")):
        raise location.error(f"field {path}: {names(unknown)} unknown; a part has type and text")
    return require_text(part["text"], f"{path}.text", location)


def _is_learned(weight: Any, role: str, path: str, location: SourceLocation) -> bool:
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise location.error(f"field {path}: expected 0, not learned, or 1, learned")
    if weight is not None and role != "assistant":
        raise location.error(f"field {path}: only assistant messages can have a weight")
    return role == "assistant" and weight != 0
