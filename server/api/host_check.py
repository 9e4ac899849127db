"""Refuses requests that call the server by a name which is not its own.

A web page can give its own domain the address 127.0.0.1 and then talk to a server on the reader's machine (DNS
rebinding). The browser still sends the page's domain as the Host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from reftserve.server.api.error_responses import error_answer

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def names_of(host: str, allowed: str) -> frozenset[str] | None:
    """Return the names to answer to; None for all. host: the address to listen on; allowed: the setting."""
    given = frozenset(name.strip().lower() for name in allowed.split(",") if name.strip())
    if "*" in given or not (given or _is_loopback(host)):
        return None
    return given | LOOPBACK_NAMES | {host.lower()}


class HostCheck:
    """ASGI middleware. names: without port and brackets, in lower case."""

    def __init__(self, app: ASGIApp, *, names: Collection[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 421 when the Host is not one of the names; HTTP/1.0 needs no Host."""
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or self._is_own(_name(host)):
            await self._app(scope, receive, send)
            return
        message = (
            f"this server does not answer to the host {host!r}, only to {', '.join(sorted(self._names))}; the setting "
            "allowed_hosts adds names"
        )
        await error_answer(421, message, "invalid_request_error", None, "unknown_host")(scope, receive, send)

    def _is_own(self, name: str) -> bool:
        """Return whether no domain of others can lead here: browsers look up neither addresses nor localhost."""
        return name in self._names or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
