"""The route class of all endpoints: reads and validates a JSON body away from the event loop.

Small bodies are read at once. Large ones take turns: few are in memory at a time, fewer of one client, and one is
parsed at a time, because parsers hold the interpreter's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from email.message import Message
from typing import Any
from weakref import WeakValueDictionary

import anyio
from anyio import CapacityLimiter
from fastapi import Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reftserve.server.api.json_body import parse_body
from reftserve.server.errors import ClientLeft, Overloaded

SMALL_BYTES = 64 << 10
LARGE_BODIES = 8
LARGE_BODIES_OF_A_CLIENT = 2  # so that one that sends slowly leaves places to others
ARRIVAL_S = 60.0
PLACE_S = 30.0  # to wait for a place in memory
RETRY_AFTER_S = 5.0

_in_memory = CapacityLimiter(LARGE_BODIES)
_of_client: WeakValueDictionary[str, CapacityLimiter] = WeakValueDictionary()  # by address, while requests use them
_parsing = CapacityLimiter(1)


class _Read(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, raw: bytes) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw

    async def body(self) -> bytes:
        """Return the body."""
        return self._raw


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
                raw = await _arrived(request, memory)
                if not raw or not _is_json(request):
                    return await handle(_Read(request, raw))  # FastAPI's own errors
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


async def _arrived(request: Request, memory: AsyncExitStack) -> bytes:
    """Return the body; from SMALL_BYTES on it holds a place, which `memory` gives back."""
    body = bytearray()
    try:
        async with asyncio.timeout(ARRIVAL_S) as limit:
            async for piece in request.stream():
                if len(body) <= SMALL_BYTES < len(body) + len(piece):
                    rest_s = (limit.when() or 0.0) - asyncio.get_running_loop().time()
                    limit.reschedule(None)
                    await memory.enter_async_context(_place(request))
                    limit.reschedule(asyncio.get_running_loop().time() + rest_s)
                body += piece
    except ClientDisconnect as cause:
        raise ClientLeft("the client left before its body had arrived") from cause
    except TimeoutError as cause:
        raise HTTPException(408, f"the body has not arrived within {ARRIVAL_S:.0f} s") from cause
    return bytes(body)


@asynccontextmanager
async def _place(request: Request) -> AsyncIterator[None]:
    """Hold one of the places in memory. Raises Overloaded when none is free in time."""
    address = request.client.host if request.client else ""
    of_client = _of_client.setdefault(address, CapacityLimiter(LARGE_BODIES_OF_A_CLIENT))
    async with AsyncExitStack() as held:
        try:
            async with asyncio.timeout(PLACE_S):
                await held.enter_async_context(of_client)
                await held.enter_async_context(_in_memory)
        except TimeoutError as cause:
            message = f"other bodies above {SMALL_BYTES >> 10} KiB have arrived too slowly for {PLACE_S:.0f} s"
            raise Overloaded(message, retry_after_s=RETRY_AFTER_S) from cause
        yield


def _is_json(request: Request) -> bool:
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
