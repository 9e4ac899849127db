"""A call: an HTTP request that is not sent yet, and the function that reads its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel

from reftserve.client.schemas import Page

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """The file part of a multipart body. Each attempt opens a path anew."""

    name: str
    content: bytes | Path


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and its answer's reader. read_timeout_s: longest silence; None takes the client's timeout."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    json: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    read_timeout_s: float | None = None
    form: Mapping[str, str] = field(default_factory=dict)
    upload: Upload | None = None

    @property
    def is_idempotent(self) -> bool:
        """Return whether sending the call twice has the same effect as sending it once."""
        return self.method in ("GET", "PUT", "DELETE")


def one(model: type[M]) -> Callable[[httpx.Response], M]:
    """Return a reader of an answer that is one object."""
    return lambda response: model.model_validate_json(response.content)


def listed(page: type[Page[M]]) -> Callable[[httpx.Response], list[M]]:
    """Return a reader of the rows of an answer that is a page."""
    return lambda response: page.model_validate_json(response.content).data


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
