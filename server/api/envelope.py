"""OpenAI's list envelope: a page of rows with the ids that the next and the previous page begin behind."""

from __future__ import annotations

from typing import TypeVar

from reftserve.client.schemas import Page

T = TypeVar("T")


def page(data: list[T], ids: list[str], *, has_more: bool) -> Page[T]:
    """Return a page. ids: of its rows, as `after` takes them."""
    return Page(data=data, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
