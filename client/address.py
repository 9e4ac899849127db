"""A server's address as people write it, and the proxies of the environment on the way to it."""

from __future__ import annotations

import ipaddress
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx

from reftserve.client.exceptions import AddressError

DEFAULT_PORT, LAST_PORT = 8000, 65535
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


def base_url(url: str) -> str:
    """Return an address as an absolute URL without the `/v1` that OpenAI's clients want at its end.

    A host without a scheme means http, and port 8000 unless it names another. An IPv6 address may lack its brackets.
    Raises AddressError.
    """
    scheme, separator, rest = url.strip().rpartition("://")
    scheme = scheme.lower() or "http"
    if scheme not in ("http", "https"):
        raise AddressError(f"the address {url!r} begins with {scheme}://; expected http:// or https://")
    place, slash, path = rest.partition("/")
    host = _bracketed(place)
    if not host:
        raise AddressError(f"the address {url!r} names no host; expected one such as {DEFAULT_URL}")
    try:
        parsed = httpx.URL(f"{scheme}://{host}{slash}{path}")
    except httpx.InvalidURL as cause:
        raise AddressError(f"the address {url!r} is wrong: {cause}; expected one such as {DEFAULT_URL}") from cause
    if (parsed.port or 0) > LAST_PORT:
        raise AddressError(f"the address {url!r} has the port {parsed.port}; the last one is {LAST_PORT}")
    if not separator and parsed.port is None:
        parsed = parsed.copy_with(port=DEFAULT_PORT)
    return str(parsed).rstrip("/").removesuffix("/v1")


def _bracketed(place: str) -> str:
    """Return host and port with brackets around an IPv6 address. Raises AddressError for one with two readings."""
    if place.count(":") < 2 or "[" in place:
        return place
    head, _, tail = place.rpartition(":")
    whole, before = _is_ipv6(place), _is_ipv6(head) and tail.isdecimal()
    if whole and before:
        raise AddressError(f"the address {place!r} can be meant in two ways; write [{place}] or [{head}]:{tail}")
    return f"[{place}]" if whole else f"[{head}]:{tail}" if before else place


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def connection_options(url: str, api_key: str | None) -> dict[str, Any]:
    """Return httpx's arguments for a server's address. Proxies of the environment are not asked for this machine.

    Raises AddressError when the address is wrong, or the environment names a proxy that httpx cannot use.
    """
    base = base_url(url)
    host = httpx.URL(base).host
    is_direct = _is_loopback(host) or bool(proxy_bypass(host))
    if not is_direct:
        _check_proxies()
    options = {"base_url": base, "headers": headers(api_key), "trust_env": not is_direct}
    # Without its environment httpx would not read SSL_CERT_FILE either.
    return {**options, "verify": httpx.create_ssl_context()} if is_direct and base.startswith("https:") else options


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _check_proxies() -> None:
    for scheme, proxy in getproxies().items():
        if scheme not in ("http", "https", "all"):
            continue
        hint = f"unset {scheme.upper()}_PROXY, or name the server's host in NO_PROXY"
        if proxy.startswith("socks") and find_spec("socksio") is None:
            raise AddressError(f"{scheme.upper()}_PROXY is a SOCKS proxy: pip install 'httpx[socks]', or {hint}")
        try:
            httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
        except (ValueError, httpx.InvalidURL) as cause:
            raise AddressError(f"{scheme.upper()}_PROXY is no proxy that can be used ({cause}); {hint}") from cause


def headers(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
