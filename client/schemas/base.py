"""What all wire types build on.

Requests forbid unknown fields, so that a typing error is an answer and not silence; responses ignore what they do not
know, so that an older client reads a newer server.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Response(BaseModel):
    """Base of everything the server answers."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


T = TypeVar("T")


class Page(Response, Generic[T]):
    """OpenAI's list envelope."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Response):
    """Answer of DELETE."""

    id: str
    object: str
    deleted: Literal[True] = True


class ErrorDetail(Response):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Response):
    """Body of every answer with a status of 400 or above."""

    error: ErrorDetail
