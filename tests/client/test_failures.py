"""The client against a server that is busy, unreachable, or breaks connections on purpose."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from reftserve.client import Client, ConnectionFailed, JobEnded, Overloaded, ReftServeError, StreamFailed, Unavailable
from reftserve.client.exceptions import EvalRunEnded, ResponseError, UnexpectedAnswer
from reftserve.client.schemas import EvalRun, FineTuningJob


class Misbehaving:
    def __init__(self, *answers: Response) -> None:
        self.answers = list(answers)
        self.requests: list[str] = []
        self.paths: list[str] = []
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.answer, methods=["GET", "POST", "DELETE", "PUT"])

    async def answer(self, path: str, request: Request) -> Response:
        self.requests.append(request.method)
        self.paths.append(f"/{path}")
        return self.answers[min(len(self.requests), len(self.answers)) - 1]


@contextmanager
def serving(misbehaving: Misbehaving, path: str = "", user: str = "", **options: int) -> Iterator[Client]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(misbehaving.app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with Client(f"http://{user}127.0.0.1:{listener.getsockname()[1]}{path}", **options) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(10)


def error(status: int, message: str = "busy", **headers: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "t", "param": None, "code": "c"}}, status, headers)


UPLOADED = JSONResponse({"id": "file-ab12", "bytes": 1, "created_at": 0, "filename": "f", "purpose": "fine-tune"})
MODELS = JSONResponse({"object": "list", "data": [{"id": "base", "created": 0, "owned_by": "x"}]})


def listed_files(*files: tuple[str, str, str | None]) -> Response:
    rows = [
        {"id": one, "bytes": 2, "created_at": 0, "filename": name, "purpose": "fine-tune", "sha256": digest}
        for one, name, digest in files
    ]
    return JSONResponse({"object": "list", "data": rows})


def broken(*chunks: bytes) -> Response:
    async def body() -> Iterator[bytes]:  # type: ignore[misc]
        for chunk in chunks:
            yield chunk
        raise ConnectionResetError

    return StreamingResponse(body(), media_type="text/event-stream")  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [429, 503])
def test_busy_and_unavailable_servers_are_retried(status: int) -> None:
    server = Misbehaving(error(status), error(status), MODELS)
    with serving(server) as client:
        assert client.models.list()[0].id == "base"
    assert len(server.requests) == 3


def test_retries_end_and_retry_after_is_honoured() -> None:
    server = Misbehaving(error(429, **{"Retry-After": "1"}))
    with serving(server, max_retries=1) as client:
        began = time.monotonic()
        with pytest.raises(Overloaded, match="busy") as found:
            client.chat("hi", model="base")
        assert time.monotonic() - began >= 1
    assert found.value.retry_after_s == 1
    assert server.requests == ["POST", "POST"]
    server = Misbehaving(error(503))
    with serving(server, max_retries=0) as client, pytest.raises(Unavailable):
        client.models.list()


@pytest.mark.parametrize("status", [400, 404, 409, 413, 500, 507])
def test_permanent_errors_are_not_retried(status: int) -> None:
    server = Misbehaving(error(status))
    with serving(server) as client, pytest.raises(ReftServeError):
        client.models.list()
    assert len(server.requests) == 1


def test_a_broken_connection_is_retried_only_for_idempotent_requests() -> None:
    server = Misbehaving(broken(b"x"), MODELS)
    with serving(server) as client:
        assert client.models.list()[0].id == "base"
    server = Misbehaving(broken(b"x"), MODELS)
    with serving(server) as client, pytest.raises(ConnectionFailed):
        client.chat("hi", model="base")
    assert server.requests == ["POST"]


def chunk(text: str) -> bytes:
    choice = f'{{"index": 0, "text": "{text}", "finish_reason": null}}'
    body = f'{{"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [{choice}]}}'
    return f"data: {body}\n\n".encode()


def test_a_stream_that_breaks_keeps_the_pieces_before() -> None:
    failure = b'data: {"error": {"message": "engine died", "type": "server_error", "param": null, "code": "x"}}\n\n'
    for answer, expected in (
        (StreamingResponse(iter([chunk("one"), failure]), media_type="text/event-stream"), StreamFailed),
        (broken(chunk("one")), ConnectionFailed),
    ):
        with serving(Misbehaving(answer)) as client, client.stream("p", model="m") as pieces:
            with pytest.raises(expected):
                list(pieces)
            assert pieces.text == "one"


@pytest.mark.parametrize("n", [2, 3])
def test_a_stream_of_several_answers_is_refused_before_anything_is_sent(n: int) -> None:
    server = Misbehaving(MODELS)
    with serving(server) as client:
        for prompt in ({"prompt": "p"}, {"messages": "p"}):
            with pytest.raises(ValueError, match=f"n is {n}.*one answer"):
                client.stream(**prompt, n=n)  # type: ignore[arg-type]
    assert server.requests == []


def test_a_foreign_answer_is_refused_without_the_password_of_the_address() -> None:
    hello = Misbehaving(PlainTextResponse("hello"))
    with serving(hello, user="user:secret@") as client, pytest.raises(UnexpectedAnswer) as failure:
        client.models.list()
    assert "secret" not in str(failure.value)


def test_a_failed_connection_names_the_url_and_how_to_start_a_server() -> None:
    refused = pytest.raises(ConnectionFailed, match=r"http://127\.0\.0\.1:9.*reftserve serve")
    with Client("http://127.0.0.1:9", max_retries=0) as client, refused:
        client.models.list()
    with Client("127.0.0.1:9", max_retries=0) as client, refused:
        client.models.list()
    with Client("http://user:secret@127.0.0.1:9", max_retries=0) as client, refused as failure:
        client.models.list()
    assert "secret" not in str(failure.value)
    broke_off = pytest.raises(ConnectionFailed, match=r"http://127\.0\.0\.1:\d+/v1/completions")
    with serving(Misbehaving(broken(chunk("one")))) as client, client.stream("p", model="m") as pieces, broke_off:
        list(pieces)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
def test_a_url_may_end_in_v1_as_openai_clients_write_it(prefix: str, suffix: str) -> None:
    server = Misbehaving(MODELS)
    with serving(server, prefix + suffix) as client:
        client.models.list()
    assert server.paths == [f"{prefix}/v1/models"]


def test_a_local_file_wins_over_an_id_and_only_hexadecimal_is_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file-reviews.jsonl", "file-ab12"):
        (tmp_path / name).write_text("{}")
        server = Misbehaving(listed_files(), UPLOADED)
        with serving(server) as client:
            assert client.files.id_of(name) == "file-ab12"
        assert server.requests == ["GET", "POST"], name
    server = Misbehaving(UPLOADED)
    with serving(server) as client:
        assert client.files.id_of("file-0123456789abcdef") == "file-0123456789abcdef"
        with pytest.raises(FileNotFoundError, match=r"file-absent\.jsonl"):
            client.files.id_of("file-absent.jsonl")
    assert server.requests == []


def test_a_data_set_that_the_server_has_is_not_uploaded_again(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    server = Misbehaving(listed_files(("file-1", "set.jsonl", None), ("file-2", "set.jsonl", digest)))
    with serving(server) as client:
        assert client.files.id_of(file) == "file-2"
    assert server.requests == ["GET"]
    for kept in (("file-1", "set.csv", digest), ("file-1", "set.jsonl", "0" * 64)):
        server = Misbehaving(listed_files(kept), UPLOADED)
        with serving(server) as client:
            assert client.files.id_of(file) == "file-ab12"
        assert server.requests == ["GET", "POST"], "another name or content"


def test_an_error_without_an_error_object_is_still_reported() -> None:
    with (
        serving(Misbehaving(PlainTextResponse("a proxy's page", 502))) as client,
        pytest.raises(ReftServeError, match="HTTP 502: a proxy's page"),
    ):
        client.models.list()


def test_an_answer_of_another_server_names_the_address() -> None:
    with serving(Misbehaving(PlainTextResponse("<html>a router's page</html>"))) as client:
        with pytest.raises(UnexpectedAnswer, match=r"http://127\.0\.0\.1:\d+/v1/models is not a ReftServe server's"):
            client.models.list()
        with pytest.raises(UnexpectedAnswer, match="is not a ReftServe server's"):
            client.interventions.download("name", "folder")


def test_an_error_names_the_url_that_was_asked() -> None:
    with serving(Misbehaving(error(404))) as client, pytest.raises(ReftServeError) as found:
        client.models.list()
    assert isinstance(found.value, ResponseError)
    assert str(found.value.url).endswith("/v1/models")


@pytest.mark.parametrize(("status", "said"), [("cancelled", "was cancelled"), ("failed", "has failed")])
def test_a_job_that_ended_without_an_intervention_says_so_in_english(status: str, said: str) -> None:
    job = FineTuningJob.model_construct(id="ftjob-1", status=status, error=None)
    assert str(JobEnded(job)) == f"job ftjob-1 {said}"
    run = EvalRun.model_construct(id="evalrun-1", status=status, error=None)
    assert str(EvalRunEnded(run)) == f"run evalrun-1 {said}"


def test_the_client_imports_no_torch() -> None:
    code = "import sys, reftserve.client, reftserve.client.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
