"""A body above the limit is refused before the framework reads it whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from fastapi import Body, FastAPI, UploadFile

from reftserve.server.api.body_limit import FRAMING_BYTES, BodyLimit
from reftserve.server.api.error_responses import install_error_handlers

MEBIBYTE = 1 << 20
JSON_BYTES = 16 * MEBIBYTE
BEGIN = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
END = b"\r\n--b--\r\n"
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


def app() -> FastAPI:
    found = FastAPI()
    install_error_handlers(found)
    found.add_middleware(BodyLimit, upload_bytes={"/upload": 4 * MEBIBYTE}, json_bytes=JSON_BYTES)

    @found.post("/upload")
    def upload(file: UploadFile) -> int:
        return file.size or 0

    @found.post("/json")
    def json(text: str = Body()) -> int:
        return len(text)

    return found


def post(path: str, headers: dict[str, str], begin: bytes, mebibytes: int, end: bytes) -> tuple[httpx.Response, int]:
    taken = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal taken
        yield begin
        for _ in range(mebibytes):
            taken += 1
            yield b"x" * MEBIBYTE
        yield end

    async def sent() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app()), base_url="http://test") as client:
            return await client.post(path, content=pieces(), headers=headers)

    return anyio.run(sent), taken


@pytest.mark.parametrize("declared", [{}, {"Content-Length": str(64 * MEBIBYTE)}])
def test_an_upload_above_the_limit_is_refused_during_the_transfer(declared: dict[str, Any]) -> None:
    answer, taken = post("/upload", {**MULTIPART, **declared}, BEGIN, 64, END)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (413, "payload_too_large", "invalid_request_error")
    assert str(4 * MEBIBYTE + FRAMING_BYTES) in error["message"]
    assert taken <= (0 if declared else 6)


def test_an_upload_within_the_limit_is_accepted() -> None:
    answer, _ = post("/upload", MULTIPART, BEGIN, 4, END)
    assert (answer.status_code, answer.json()) == (200, 4 * MEBIBYTE)


def test_json_has_a_limit_of_its_own() -> None:
    headers = {"Content-Type": "application/json"}
    answer, taken = post("/json", headers, b'"', 2 * JSON_BYTES // MEBIBYTE, b'"')
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    assert taken <= JSON_BYTES // MEBIBYTE + 1
    assert post("/json", headers, b'"', 8, b'"')[0].json() == 8 * MEBIBYTE
