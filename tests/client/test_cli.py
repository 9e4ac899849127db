"""The command line against a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from api_data import chat_lines
from running_server import RunningServer

from reftserve.client import Client, cli

REFTSERVE = Path(sys.executable).parent / "reftserve"


@pytest.fixture
def run(server: RunningServer):  # type: ignore[no-untyped-def]
    def run(*words: str, code: int = 0, stdin: str = "", **env: str) -> str:
        environment = {**os.environ, "REFTSERVE_URL": server.url, **env}
        done = subprocess.run(
            [str(REFTSERVE), *words], input=stdin, capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_generate_and_chat(run, trained: str) -> None:  # type: ignore[no-untyped-def]
    plain = json.loads(run("--json", "generate", "the fox", "--max-tokens", "8", "--temperature", "0"))
    assert plain["usage"]["completion_tokens"] == 8
    assert run("generate", "-", "--max-tokens", "8", "--temperature", "0", stdin="the fox").rstrip("\n") == plain[
        "text"
    ].rstrip("\n")
    edited = run("chat", "say yes 1", "--model", trained, "--max-tokens", "5", "--temperature", "0")
    assert edited == run(
        "chat", "say yes 1", "--intervention", "greeter@1*1.0", "--max-tokens", "5", "--temperature", "0"
    )
    talk = run("chat", "--max-tokens", "4", "--temperature", "0", stdin="hello\nagain\n\n")
    assert talk.count("\n") >= 2


def test_files_train_jobs_and_interventions(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = tmp_path / "set.jsonl"
    data.write_bytes(chat_lines(24))
    file = json.loads(run("--json", "files", "upload", str(data)))
    assert file["examples"] == 24
    report = json.loads(run("--json", "files", "check", file["id"], "--max-length", "100"))
    assert (report["labels"], report["max_length"]) == (["no", "yes"], 100)
    shape = ["--layers", "0,2", "--rank", "1", "--epochs", "1", "--early-stopping", "3"]
    job = json.loads(run("--json", "train", file["id"], "--name", "cli", *shape))
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", "cli@1")
    assert (job["plan"]["layers"], job["plan"]["early_stopping_epochs"]) == ([0, 2], 3)
    assert job["id"] in run("jobs", "list")
    assert "Published cli@1" in run("jobs", "events", job["id"])
    assert "succeeded" in run("jobs", "watch", job["id"])
    for verb in ("pause", "resume", "retry"):
        assert job["id"] in run("jobs", verb, job["id"], code=1), "of a job that has ended"
    folder = tmp_path / "out"
    assert run("interventions", "download", "cli@latest", str(folder)).strip() == str(folder)
    assert json.loads(run("--json", "interventions", "upload", "cli2", str(folder)))["id"] == "cli2@1"
    assert "stable" in run("interventions", "alias", "cli2", "stable", "1")
    assert "cli2" in run("interventions", "list")
    assert "content_hash" in run("interventions", "show", "cli2@stable")
    run("interventions", "unalias", "cli2", "stable")
    run("interventions", "delete", "cli2")
    assert "cli2" not in run("interventions", "list")
    assert run("files", "download", file["id"]).encode() == chat_lines(24)
    assert "deleted" in run("files", "delete", file["id"])


def test_an_error_is_one_line_with_a_nonzero_exit_code(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    unknown = run("chat", "hi", "--model", "nothing-like-it", code=1)
    assert unknown.startswith("error: ")
    assert "'nothing-like-it'" in unknown
    assert unknown.count("\n") == 1
    assert "no answer from the server" in run("files", "list", code=1, REFTSERVE_URL="http://127.0.0.1:9")
    assert "absent.jsonl" in run("files", "upload", str(tmp_path / "absent.jsonl"), code=1)
    assert "is no number" in run("chat", "hi", "--intervention", "a*b", code=2)


@pytest.mark.parametrize(
    ("words", "url", "expected"),
    [
        (["files", "upload", "."], "http://127.0.0.1:9", "error: .: Is a directory"),
        (["files", "list"], "http://127.0.0.1:notaport", "error: Invalid port"),
        (["files", "list"], "http://127.0.0.1:9", "error: no answer from the server at http://127.0.0.1:9"),
    ],
)
def test_a_wrong_path_or_url_gives_a_one_line_error(words: list[str], url: str, expected: str, tmp_path: Path) -> None:
    environment = {**os.environ, "REFTSERVE_URL": url}
    done = subprocess.run(
        [str(REFTSERVE), *words], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (PermissionError(13, "Permission denied", "set.jsonl"), "error: set.jsonl: Permission denied\n"),
        (TimeoutError("run r is still queued after 3 seconds"), "error: run r is still queued after 3 seconds\n"),
    ],
)
def test_a_system_failure_gives_a_one_line_error(
    cause: OSError, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise cause

    monkeypatch.setattr(type(Client().files), "list", fail)
    monkeypatch.setattr(sys, "argv", ["reftserve", "files", "list"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == expected


def test_doctor_names_every_problem(run, tiny_llama_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    good = run("doctor", "--model", str(tiny_llama_folder), "--data", str(tmp_path), "--port", "0")
    assert "base model: tiny-llama" in good
    bad = subprocess.run(
        [str(REFTSERVE), "doctor", "--model", str(tmp_path / "none"), "--data", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bad.returncode == 1
    assert "wrong base model" in bad.stdout


def test_without_the_server_extra_serve_explains_the_installation(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'transformers', 'fastapi', 'pydantic_settings', 'sqlalchemy'):\n"
        "    sys.modules[name] = None\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([str(REFTSERVE), "serve"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "pip install 'reftserve[server]'" in done.stderr
    shown = subprocess.run([str(REFTSERVE), "--help"], capture_output=True, text=True, env=environment, check=False)
    assert shown.returncode == 0
    assert "serve" in shown.stdout
