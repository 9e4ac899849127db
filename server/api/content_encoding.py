"""Unpacks request bodies with `Content-Encoding: gzip` or `zstd`, piece by piece, so that BodyLimit stops a bomb."""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 64 << 10
MAX_MEMBERS = 1000  # an empty one costs its sender 20 bytes, and adds none to what BodyLimit counts
MAX_WINDOW_LOG = 23  # 8 MiB, what RFC 8878 asks every decoder to support; a frame may ask for 128 GiB


class ContentEncoding:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with an unpacked body. Reading it raises HTTPException 415 or 400."""
        if scope["type"] == "http":
            coding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
            if coding != "identity":
                receive = _Unpacked(coding, receive)
        await self._app(scope, receive, send)


class _Decoder(Protocol):
    """One gzip member or zstd frame; pieces() yields at most PIECE_BYTES each."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def pieces(self, data: bytes) -> Iterator[bytes]: ...


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            yield self._inner.decompress(data, PIECE_BYTES)
            data = self._inner.unconsumed_tail


class _Zstd:
    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG})

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._inner.decompress(data, PIECE_BYTES)
        while not (self._inner.eof or self._inner.needs_input):
            yield self._inner.decompress(b"", PIECE_BYTES)


DECODERS: dict[str, Callable[[], _Decoder]] = {"gzip": _Gzip, "x-gzip": _Gzip, "zstd": _Zstd}


class _Unpacked:
    """The `receive` of an unpacked body. A body may be several members or frames, one behind the other."""

    def __init__(self, coding: str, receive: Receive) -> None:
        self._coding = coding
        self._receive = receive
        self._make = DECODERS.get(coding)
        self._pieces: Iterator[bytes] = iter(())
        self._more = True
        self._is_whole = True
        self._members = 0
        self._ended = False

    async def __call__(self) -> Message:
        if self._make is None:
            raise HTTPException(415, f"Content-Encoding {self._coding!r} is not read; expected gzip, zstd or none")
        while not self._ended:
            piece = self._next()
            if piece is not None:
                await asyncio.sleep(0)  # 64 KiB received may be 64 MiB unpacked, and nothing else here waits
                return {"type": "http.request", "body": piece, "more_body": True}
            if not self._more:
                return self._end()
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._more = message.get("more_body", False)
            self._pieces = self._unpack(message.get("body", b""))
        return await self._receive()

    def _next(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        except (zlib.error, zstd.ZstdError) as cause:
            raise HTTPException(400, f"the body is not {self._coding}: {cause}") from cause

    def _end(self) -> Message:
        if not self._is_whole:
            raise HTTPException(400, f"the body's {self._coding} ends too early")
        self._ended = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _unpack(self, data: bytes) -> Iterator[bytes]:
        assert self._make is not None  # noqa: S101 - refused before
        while data:
            if self._is_whole:
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise HTTPException(400, f"the body has more than {MAX_MEMBERS} members of {self._coding}")
                self._decoder = self._make()
                self._is_whole = False
            yield from self._decoder.pieces(data)
            self._is_whole = self._decoder.eof
            data = self._decoder.unused_data if self._decoder.eof else b""
