"""How large a request's body may be: refused by what it declares, or else as soon as it has sent too much.

The framework takes a whole body, into memory or a temporary file, before any endpoint sees it.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON_BYTES = 64 << 20
FRAMING_BYTES = 1 << 20  # of a multipart body: its other fields, and what stands between them


class BodyLimit:
    """ASGI middleware. upload_bytes: the largest file that an endpoint takes."""

    def __init__(self, app: ASGIApp, *, upload_bytes: int) -> None:
        self._app = app
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whoever reads a body above the limit gets an HTTPException of status 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_upload = headers.get("content-type", "").startswith("multipart/")
        limit = self._upload_bytes + FRAMING_BYTES if is_upload else JSON_BYTES
        declared = headers.get("content-length", "")
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
