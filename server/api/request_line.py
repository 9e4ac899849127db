"""HEAD is GET without the body, and a slash at the end of a path means nothing.

Redirecting such a path would name an absolute address, which is wrong behind a proxy that adds a prefix.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


def sent_method(scope: Scope) -> str:
    """Return the method that the client has sent."""
    method: str = scope.get("sent_method", scope["method"])
    return method


class RequestLine:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with the method and the path that its routes know."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if path in ("", scope.get("root_path", "").rstrip("/")):
            path += "/"
        if scope["method"] != "HEAD":
            await self._app({**scope, "path": path}, receive, send)
            return
        answered = False

        async def send_head(message: Message) -> None:
            nonlocal answered
            if message["type"] != "http.response.body":
                await send(message)
            elif not answered:
                answered = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def receive_until_answered() -> Message:
            return {"type": "http.disconnect"} if answered else await receive()

        await self._app(
            {**scope, "path": path, "method": "GET", "sent_method": "HEAD"}, receive_until_answered, send_head
        )
