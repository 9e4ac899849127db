"""HTTP itself: methods, paths, hosts, origins, packed bodies, slow and old clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_data import BASE, chat_lines
from running_server import RunningServer, running_server

from reftserve.server.api.request_line import RequestLine, sent_method

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
JSON = {"Content-Type": "application/json"}
PAGE = "https://page.example"


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def address(server: RunningServer) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def raw(server: RunningServer, sent: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    with socket.create_connection(address(server), timeout=20) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture(scope="module")
def proxied(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server below a prefix, open to one page's scripts, that waits a second for a header."""
    flags = ("--root-path", "/llm", "--cors-origins", f"{PAGE}, https://b.example", "--allowed-hosts", "models.example")
    folder = tmp_path_factory.mktemp("proxied")
    env = {"REFTSERVE_HEADER_TIMEOUT_S": "1"}
    with running_server(tiny_llama_folder, folder, *flags, worker=False, env=env) as running:
        yield running


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/v1", "/openapi.json"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    got, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_of_a_stream_ends(http: httpx.Client) -> None:
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", chat_lines(12))}).json()
    job = http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file["id"]}).json()["id"]
    answer = http.head(f"/v1/fine_tuning/jobs/{job}/events?stream=true")
    assert (answer.status_code, answer.content) == (200, b"")
    assert http.get(f"/v1/fine_tuning/jobs/{job}").json()["status"] != "succeeded", "the stream has not ended by itself"
    http.post(f"/v1/fine_tuning/jobs/{job}/cancel")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/files", "GET, HEAD, POST"),
        ("POST", "/v1/files/file-x", "DELETE, GET, HEAD"),
        ("TRACE", "/v1/models", "GET, HEAD"),
        ("HEAD", "/v1/completions", "POST"),
    ],
)
def test_a_wrong_method_is_answered_with_the_right_ones(
    http: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_messages_and_the_log_name_the_method_that_was_sent() -> None:
    for sent in ("GET", "HEAD"):
        scope = {"type": "http", "method": sent, "path": "/a", "headers": []}
        found: list[Any] = []

        async def routes(scope: Any, receive: Any, send: Any, found: list[Any] = found) -> None:
            found.append((scope["method"], sent_method(scope)))

        asyncio.run(RequestLine(routes)(scope, None, None))  # type: ignore[arg-type]
        assert found == [("GET", sent)]


def test_a_slash_at_the_end_is_answered_and_not_redirected(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    assert http.post("/v1/chat/completions/", json=CHAT).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
def test_the_roots_say_where_things_are(http: httpx.Client, path: str) -> None:
    found = http.get(path).json()
    assert (found["api"], found["documentation"], found["model"]) == ("/v1", "/docs", BASE)
    assert http.get(found["documentation"]).status_code == http.get(found["openapi"]).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/llm"], ids=["stripped by the proxy", "kept by the proxy"])
def test_a_server_below_a_prefix_answers_with_and_without_it(proxied: RunningServer, prefix: str) -> None:
    with httpx.Client(base_url=proxied.url + prefix, timeout=60) as http:
        assert http.get("/v1").json()["documentation"] == "/llm/docs"
        assert http.get("/v1/models/").json()["data"][0]["id"] == BASE
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert "/llm/openapi.json" in http.get("/docs").text
        assert http.get("/").json()["model"] == BASE
        upload = {"file": ("a.jsonl", b"\n" * (5 << 20) + chat_lines(3))}  # above the limit of JSON
        answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files=upload)
        assert answer.status_code != 413, "the limit of uploads is theirs, whatever the prefix"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "a@b", "localhost.example"]
)
def test_a_loopback_server_refuses_foreign_names(http: httpx.Client, server: RunningServer, host: str) -> None:
    found = error(http.get("/v1/models", headers={"Host": host}), 421)
    assert found["code"] == "unknown_host"
    assert "allowed_hosts" in found["message"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "[::1]", "10.1.2.3:8000", "[::2]", "a.localhost:1"],
)
def test_a_loopback_server_answers_to_names_that_no_domain_can_take(http: httpx.Client, host: str) -> None:
    assert http.get("/health", headers={"Host": host}).status_code == 200


def test_allowed_hosts_add_names(proxied: RunningServer) -> None:
    for host, status in (("models.example", 200), ("localhost", 200), ("other.example", 421)):
        assert httpx.get(f"{proxied.url}/health", headers={"Host": host}).status_code == status


def test_scripts_of_other_origins_are_refused_unless_a_setting_names_them(
    http: httpx.Client, proxied: RunningServer
) -> None:
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    assert "access-control-allow-origin" not in http.options("/v1/chat/completions", headers=preflight).headers
    with httpx.Client(base_url=proxied.url, timeout=60) as allowed:
        answer = allowed.options("/v1/chat/completions", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        answer = allowed.post("/v1/chat/completions", json=CHAT, headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == PAGE
        answer = allowed.get("/health", headers={"Origin": "https://c.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_pages_of_other_origins_cannot_change_anything(http: httpx.Client, proxied: RunningServer) -> None:
    form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", chat_lines(3))}}
    own = str(http.base_url).rstrip("/")
    foreign = [{"Origin": PAGE}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
    foreign.append({"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site"})
    for headers in foreign:
        assert error(http.post("/v1/files", headers=headers, **form), 403)["code"] == "foreign_origin"
        assert error(http.delete("/v1/files/file-x", headers=headers), 403)["code"] == "foreign_origin"
        assert http.get("/v1/files", headers=headers).status_code == 200
    assert "cors_origins" in error(http.put("/v1/interventions/a/aliases/b", headers=foreign[0]), 403)["message"]
    for headers in ({}, {"Origin": own}, {"Origin": "https://a.example", "Sec-Fetch-Site": "same-origin"}):
        assert http.post("/v1/files", headers=headers, **form).status_code == 200
    named = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
    assert httpx.post(f"{proxied.url}/v1/files", headers=named, **form).status_code == 200


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([(f"a{number}", (None, "b")) for number in range(50)], "Too many fields"),
        ([("file", ("a.jsonl", b"a"))] * 50, "Too many files"),
        ([("purpose", (None, "a" * 5000))], "exceeded maximum size of 4KB"),
    ],
    ids=["fields", "files", "long"],
)
@pytest.mark.parametrize("path", ["/v1/files", "/v1/interventions"])
def test_a_form_is_refused_before_its_parts_fill_the_memory(
    http: httpx.Client, path: str, parts: list[Any], says: str
) -> None:
    assert says in error(http.post(path, files=parts), 400)["message"]


def test_a_client_that_leaves_while_it_sends_is_one_line_in_the_log(server: RunningServer) -> None:
    before = server.log.stat().st_size
    header = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address(server), timeout=20) as connection:
        connection.sendall(f"{header}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.3)
    deadline = time.monotonic() + 10
    while (logged := server.log.read_bytes()[before:].decode().splitlines()) == [] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(logged) == 1
    assert "the client left before its body had arrived" in logged[0]


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (gzip.compress(b"") * 1001, 400, "more than 1000 members"),
        (gzip.compress(b"{}") + gzip.compress(b"") * 250_000, 413, "which is the limit"),
    ],
    ids=["members", "packed bytes"],
)
def test_empty_members_of_a_packed_body_are_counted(http: httpx.Client, content: bytes, status: int, says: str) -> None:
    answer = http.post("/v1/completions", content=content, headers={**JSON, "Content-Encoding": "gzip"})
    assert says in error(answer, status)["message"]


PACK: dict[str, Any] = {"gzip": gzip.compress, "x-gzip": gzip.compress, "zstd": zstd.compress, "identity": bytes}


@pytest.mark.parametrize("coding", PACK)
def test_a_packed_body_is_read(http: httpx.Client, coding: str) -> None:
    def answer(content: bytes) -> str:
        headers = {**JSON, "Content-Encoding": coding}
        response = http.post("/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    body = json.dumps(CHAT).encode()
    plain = http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    assert answer(PACK[coding](body)) == plain
    # Both formats allow several parts, one behind the other.
    assert answer(PACK[coding](body[:20]) + PACK[coding](body[20:])) == plain


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_packed_file_is_read(http: httpx.Client, coding: str) -> None:
    parts = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\nContent-Disposition: '
    parts += b'form-data; name="file"; filename="a.jsonl"\r\n\r\n' + chat_lines(12) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": coding}
    answer = http.post("/v1/files", content=PACK[coding](parts), headers=headers)
    assert answer.json()["examples"] == 12


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_bomb_is_refused_while_it_is_unpacked(http: httpx.Client, server: RunningServer, coding: str) -> None:
    bomb = PACK[coding](b'{"model": "' + b"a" * (1 << 30))
    assert len(bomb) < 2 << 20
    before = server_memory(server)
    found = error(http.post("/v1/chat/completions", content=bomb, headers={**JSON, "Content-Encoding": coding}), 413)
    assert found["code"] == "payload_too_large"
    assert server_memory(server) - before < 50 << 20


def server_memory(server: RunningServer) -> int:
    import psutil

    return int(psutil.Process(server.process.pid).memory_info().rss)


@pytest.mark.parametrize(
    ("coding", "content", "status"),
    [
        ("br", b"a", 415),
        ("gzip, zstd", b"a", 415),
        ("gzip", b"{}", 400),
        ("zstd", b"{}", 400),
        ("gzip", gzip.compress(b"{}" * 99)[:-9], 400),
        ("zstd", zstd.compress(b"{}" * 99)[:-3], 400),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused(
    http: httpx.Client, coding: str, content: bytes, status: int
) -> None:
    answer = http.post("/v1/chat/completions", content=content, headers={**JSON, "Content-Encoding": coding})
    assert coding.split(",")[0] in error(answer, status)["message"]


def test_an_http_1_0_stream_has_no_chunks_and_ends_with_the_connection(server: RunningServer) -> None:
    body = json.dumps({**CHAT, "stream": True}).encode()
    header = (
        f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    head, _, content = raw(server, header.encode() + body).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert content.startswith(b"data: {")
    assert content.endswith(b"data: [DONE]\n\n")
    head, _, content = raw(server, b"GET /health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert (b"content-length: 15" in head.lower(), json.loads(content)) == (True, {"status": "ok"})


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc", b"\r\n\r\n"])
def test_a_connection_without_a_whole_header_is_closed(proxied: RunningServer, sent: bytes) -> None:
    begun = time.monotonic()
    with socket.create_connection(address(proxied), timeout=20) as connection:
        connection.sendall(sent)
        assert received(connection) == b""
    assert time.monotonic() - begun > 0.5


def test_a_second_header_has_a_limit_of_its_own(proxied: RunningServer) -> None:
    with socket.create_connection(address(proxied), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert b"200 OK" in answer
        time.sleep(0.5)
        connection.sendall(b"GET /hea")
        begun = time.monotonic()
        assert received(connection) == b""
        assert time.monotonic() - begun > 0.5


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def test_a_long_answer_outlasts_the_limit_of_headers(proxied: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{proxied.url}/v1", api_key="any", max_retries=0)
    body: Any = {**CHAT, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    pieces = list(client.chat.completions.create(**body, stream=True))
    assert len(pieces) > 100


def test_a_client_that_leaves_is_one_line_in_the_log(server: RunningServer) -> None:
    before = server.log.stat().st_size
    body = json.dumps({**CHAT, "max_tokens": 450, "ignore_eos": True, "n": 4}).encode()
    header = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    header += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(address(server), timeout=20) as connection:
        connection.sendall(header.encode() + body)
        time.sleep(0.3)
    deadline = time.monotonic() + 10
    while (logged := server.log.read_bytes()[before:].decode().splitlines()) == [] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(logged) == 1
    assert "INFO" in logged[0]
    assert "/v1/chat/completions" in logged[0]


def test_an_error_quotes_at_most_two_hundred_characters(http: httpx.Client) -> None:
    long = "x" * 5000
    for body in (
        {**CHAT, long: 1},
        {**CHAT, "response_format": {"type": long}},
        {**CHAT, "interventions": [{long: 1}]},
    ):
        found = error(http.post("/v1/chat/completions", json=body), 400)
        assert "x" * 80 in found["message"]
        assert max(found["message"].count("x"), found["param"].count("x")) <= 210
    assert http.get(f"/v1/models/{long}").text.count("x") <= 420
    assert http.get(f"/v1/{long}").text.count("x") <= 210
