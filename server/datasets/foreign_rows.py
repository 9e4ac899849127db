"""Rows of other tools, by their fields: what they are, and how to make rows of ours from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

SHAREGPT = (
    "ShareGPT's form: rename `conversations` to `messages`, `from` to `role` (human: user, gpt: assistant) and "
    "`value` to `content`"
)
_COLUMN_WISE = "One object with a list for each column: write one row per line, {}"
_FORMS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"conversations"}), SHAREGPT),
    (frozenset({"conversation"}), "Rename `conversation` to `messages`, a list of objects with role and content"),
    (
        frozenset({"chosen", "rejected"}),
        "Preference rows: one answer is learned for each prompt; write `prompt` and, as `completion`, the chosen text",
    ),
    (
        frozenset({"question", "answer"}),
        "Questions: rename `question` to `prompt`, `answer` to `completion`",
    ),
    (frozenset({"question", "answers"}), "Questions with several answers: write `prompt` and one `completion` a row"),
    (frozenset({"prompt", "response"}), "Rename `response` to `completion`"),
    (frozenset({"instruction", "response"}), "Rename `response` to `output`"),
    (
        frozenset({"input", "output"}),
        "No instruction: rename `input` to `prompt`, `output` to `completion`",
    ),
    (
        frozenset({"text", "label"}),
        "Texts and labels: rename `text` to `prompt`, and write each label as a word in `completion`",
    ),
    (frozenset({"text"}), "Plain text names no prompt and no answer: split each text into `prompt` and `completion`"),
)


def advice(row: Mapping[str, Any] | Collection[str]) -> str | None:
    """Return what a row with these fields is in another tool, and what to do; None for rows of ours or unknown ones.

    row: fields with values, or the names of a table's columns.
    """
    given = {name for name in row if not isinstance(row, Mapping) or row[name] is not None}
    if isinstance(row, Mapping) and (found := _of_values(row, given)):
        return found
    for fields, text in _FORMS:
        if fields <= given and not (fields == {"input", "output"} and "instruction" in given):
            return text
    return None


def _of_values(row: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Return advice for JSON rows whose values tell the form."""
    lists = [name for name in given if isinstance(row[name], list)]
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return "TRL's conversational form: join the lists `prompt` and `completion` to one list, `messages`"
    if len(lists) == len(given) and not {"prompt", "instruction"}.isdisjoint(lists):
        fields = "prompt and completion" if "prompt" in lists else "instruction and output"
        return _COLUMN_WISE.format(f"with {fields} as texts")
    if len(given) == 1 and lists and lists[0] not in ("messages", "conversations", "conversation"):
        return f"An object around the rows: write the list of `{lists[0][:40]}` alone, as one JSON array"
    return None
