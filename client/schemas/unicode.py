"""Strings with half a surrogate pair (U+D800 to U+DFFF), which JSON can write and UTF-8 cannot encode."""

from __future__ import annotations

from typing import Any

_TEXTUAL = {str, dict, list}


def half_pair(value: Any) -> str | None:
    """Return a string in a JSON value, keys included, that holds half a surrogate pair; None when none does."""
    # An explicit stack: the JSON parser accepts values deeper than Python's recursion limit.
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not _is_whole(item):
                return item
        elif isinstance(item, dict):
            waiting.extend(item.values())
            waiting.extend(item)
        elif isinstance(item, list) and not _TEXTUAL.isdisjoint(map(type, item)):  # skips lists of token ids
            waiting.extend(item)
    return None


def whole_text(text: str) -> str:
    """Replace each half of a surrogate pair by U+FFFD; two adjacent halves of a pair become their character."""
    return text if _is_whole(text) else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def whole(value: Any) -> Any:
    """Apply `whole_text` to all strings of a JSON value, keys included; recursion limits its depth."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, dict):
        return {whole(key): whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


def _is_whole(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
