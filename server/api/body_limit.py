"""Limit on a request's body, which the framework reads whole, into memory or a file, before it calls an endpoint."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FRAMING_BYTES = 1 << 20  # the other fields and the boundaries of a multipart body


class BodyLimit:
    """ASGI middleware. upload_bytes: the largest file that an endpoint takes, by its path; json_bytes: other bodies."""

    def __init__(self, app: ASGIApp, *, upload_bytes: Mapping[str, int], json_bytes: int) -> None:
        self._app = app
        self._json_bytes = json_bytes
        self._limits = {path: size + FRAMING_BYTES for path, size in upload_bytes.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raise HTTPException with status 413 when the application reads a body above the limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        limit = self._limits.get(path, self._json_bytes)
        declared = Headers(scope=scope).get("content-length", "")
        received = 0

        def refuse_above(size: int) -> None:
            if size > limit:
                raise HTTPException(413, f"the body has more than {limit} bytes, which is the limit")

        async def limited() -> Message:
            nonlocal received
            refuse_above(int(declared) if declared.isdecimal() else 0)
            message = await receive()
            received += len(message.get("body", b""))
            refuse_above(received)
            return message

        await self._app(scope, limited, send)
