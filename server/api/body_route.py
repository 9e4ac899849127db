"""The route class of all endpoints: reads and validates a JSON body away from the event loop.

Small bodies are read at once. Large ones take turns: few are in memory at a time, and one is parsed at a time, because
parsers hold the interpreter's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from email.message import Message
from typing import Any

import anyio
from anyio import CapacityLimiter
from fastapi import Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from reftserve.server.api.json_body import parse_body

SMALL_BYTES = 64 << 10
LARGE_BODIES = 8
ARRIVAL_S = 60.0

_in_memory = CapacityLimiter(LARGE_BODIES)
_parsing = CapacityLimiter(1)


class _Validated(Request):
    """A request whose body has been read and validated; FastAPI takes an instance of the model as it is."""

    def __init__(self, request: Request, value: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        """Return any bytes: FastAPI asks whether there are some, and the real ones need not stay in memory."""
        return b"{}"

    async def json(self) -> BaseModel:
        """Return the validated body."""
        return self._value


class BodyRoute(APIRoute):
    """A route that validates its JSON body by itself, if it takes one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        handle = super().get_route_handler()
        field = self.body_field
        if field is None or isinstance(field.field_info, params.Form):
            return handle
        model: type[BaseModel] = field.field_info.annotation  # type: ignore[assignment]

        async def validate_and_handle(request: Request) -> Response:
            async with AsyncExitStack() as memory:
                if _is_large(request):
                    await memory.enter_async_context(_in_memory)
                raw = await _arrived(request)
                if not raw or not _is_json(request):
                    return await handle(request)  # FastAPI's own errors
                value = await _validated(model, raw)
            return await handle(_Validated(request, value))

        return validate_and_handle


async def _validated(model: type[BaseModel], raw: bytes) -> BaseModel:
    if len(raw) <= SMALL_BYTES:
        return _validate(model, raw)
    return await anyio.to_thread.run_sync(_validate, model, raw, limiter=_parsing)


def _validate(model: type[BaseModel], raw: bytes) -> BaseModel:
    found = parse_body(raw)
    try:
        return model.model_validate(found)
    except ValidationError as cause:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in cause.errors(include_url=False)]
        raise RequestValidationError(errors, body=found) from cause


async def _arrived(request: Request) -> bytes:
    try:
        async with asyncio.timeout(ARRIVAL_S):
            return await request.body()
    except TimeoutError as cause:
        raise HTTPException(408, f"the body has not arrived within {ARRIVAL_S:.0f} s") from cause


def _is_large(request: Request) -> bool:
    """Whether the body is or may be above SMALL_BYTES: a compressed or chunked one tells no size."""
    declared = request.headers.get("content-length", "")
    return not declared.isdecimal() or int(declared) > SMALL_BYTES or "content-encoding" in request.headers


def _is_json(request: Request) -> bool:
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
