"""Refuses requests of web pages that change something, unless the page is the server's own or a setting names it.

A form of any page may send a multipart body to a server on the reader's machine: browsers ask nobody before, and CORS
hides only the answer.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from reftserve.server.api.error_responses import error_answer

CHANGING_METHODS = frozenset({"POST", "PUT", "DELETE"})
OWN_SITES = frozenset({"same-origin", "none"})  # none: the reader typed the address


class OriginCheck:
    """ASGI middleware. allowed: origins of pages, or * for all."""

    def __init__(self, app: ASGIApp, *, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to a page of another origin. Programs send neither of the headers that tell a page."""
        if scope["type"] != "http" or scope["method"] not in CHANGING_METHODS or self._is_allowed(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin", "another site")
        message = f"pages of {origin!r} may not change anything on this server; the setting cors_origins adds origins"
        await error_answer(403, message, "invalid_request_error", None, "foreign_origin")(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if "*" in self._allowed or origin in self._allowed:
            return True
        if site is not None:  # no page can write it, and a proxy may have changed the Host
            return site in OWN_SITES
        # A proxy may have changed the scheme.
        return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
