"""Code around httpx that both clients share: timeouts, the arguments of a request, and the names of failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import httpx
from pydantic import ValidationError

from reftserve.client.calls.call import Call
from reftserve.client.exceptions import ConnectionFailed, UnexpectedAnswer, response_error

T = TypeVar("T")
MAX_RETRIES = 3
# A long answer is silent until its first byte.
CONNECT_TIMEOUT_S = 5.0
TIMEOUT = httpx.Timeout(600.0, connect=CONNECT_TIMEOUT_S)


@contextmanager
def opened(call: Call[Any]) -> Iterator[dict[str, Any]]:
    """Yield httpx's arguments for a call; its upload is open meanwhile."""
    with ExitStack() as stack:
        arguments: dict[str, Any] = {"params": dict(call.params), "headers": dict(call.headers)}
        if call.read_timeout_s is not None:
            arguments["timeout"] = httpx.Timeout(call.read_timeout_s, connect=CONNECT_TIMEOUT_S)
        if call.json is not None:
            arguments["json"] = call.json
        if call.upload is not None:
            content = call.upload.content
            body = stack.enter_context(content.open("rb")) if isinstance(content, Path) else content
            arguments |= {"files": {"file": (call.upload.name, body)}, "data": dict(call.form)}
        yield arguments


@contextmanager
def answered(url: httpx.URL) -> Iterator[None]:
    """Raise ConnectionFailed when no answer comes from `url`."""
    try:
        yield
    except httpx.TransportError as cause:
        hint = "; is a server running there? `reftserve serve` starts one" * isinstance(cause, httpx.ConnectError)
        raise ConnectionFailed(
            f"no answer from the server at {_public(url)}: {type(cause).__name__}: {cause}{hint}"
        ) from cause


def checked(response: httpx.Response) -> httpx.Response:
    """Return a successful answer. Raises the ResponseError of any other."""
    if response.is_error:
        raise response_error(response)
    return response


def read_answer(call: Call[T], response: httpx.Response) -> T:
    """Return what a successful answer holds. Raises the ResponseError of any other, and UnexpectedAnswer."""
    try:
        return call.read(checked(response))
    except (ValidationError, BadZipFile) as cause:
        raise UnexpectedAnswer(
            f"the answer of {_public(response.request.url)} is not a ReftServe server's; does one run at that address?"
        ) from cause


def _public(url: httpx.URL) -> httpx.URL:
    """Return the address without a user's name and password."""
    return url.copy_with(userinfo=b"")
