"""The command line against a running server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
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


def test_an_error_is_one_line_with_a_nonzero_exit_code(run, trained: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    unknown = run("chat", "hi", "--model", "nothing-like-it", code=1)
    assert unknown.startswith("error: ")
    assert "'nothing-like-it'" in unknown
    assert unknown.rstrip().endswith("/v1/chat/completions)"), "it names the address"
    assert unknown.count("\n") == 1
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for words in (["files", "upload", str(empty)], ["interventions", "upload", "n", str(empty)]):
        assert run(*words, code=1).count("\n") == 1
    taken = run("interventions", "download", "greeter@1", str(empty), code=1)
    assert taken == f"error: {empty}: File exists\n"
    assert "no answer from the server" in run("files", "list", code=1, REFTSERVE_URL="http://127.0.0.1:9")
    assert "absent.jsonl" in run("files", "upload", str(tmp_path / "absent.jsonl"), code=1)
    assert "is no number" in run("chat", "hi", "--intervention", "a*b", code=2)


def test_url_and_json_may_follow_the_command(run, server: RunningServer, trained: str) -> None:  # type: ignore[no-untyped-def]
    before = run("--url", server.url, "--json", "interventions", "list", REFTSERVE_URL="http://127.0.0.1:9")
    after = run("interventions", "list", "--json", "--url", f"{server.url}/v1", REFTSERVE_URL="http://127.0.0.1:9")
    assert json.loads(before) == json.loads(after)
    assert "greeter" in after
    answer = json.loads(run("generate", "the fox", "--max-tokens", "2", "--json"))
    assert answer["usage"]["completion_tokens"] == 2


def test_a_pipe_gets_tabs_and_no_raw_objects(run, trained: str) -> None:  # type: ignore[no-untyped-def]
    heading, *rows = run("jobs", "list").splitlines()
    assert heading.split("\t") == ["ID", "STATUS", "NAME", "PUBLISHED", "CREATED"]
    assert rows
    assert all(len(row.split("\t")) == 5 and "  " not in row for row in rows)
    for words in (
        ["jobs", "show", rows[0].split("\t")[0]],
        ["interventions", "show", "greeter@1"],
        ["interventions", "list"],
    ):
        shown = run(*words)
        assert not set("{}[]") & set(shown)
        assert all(len(line.split("\t")) > 1 for line in shown.splitlines())
    assert "latest=1" in run("interventions", "list")


def test_a_broken_pipe_ends_quietly(run, server: RunningServer, trained: str) -> None:  # type: ignore[no-untyped-def]
    for words in ("jobs list", "interventions list", "--json files list", "interventions show greeter@1", "--help"):
        command = (
            f"{REFTSERVE} {words} --url {server.url} | true" if "help" not in words else f"{REFTSERVE} --help | true"
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
        assert done.stderr == "", words


def test_a_detached_job_says_how_to_follow_it(run, server: RunningServer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = tmp_path / "detached.jsonl"
    data.write_bytes(chat_lines(24))
    words = [
        str(REFTSERVE),
        "--json",
        "train",
        str(data),
        "--name",
        "detached",
        "--epochs",
        "1",
        "--rank",
        "1",
        "--detach",
    ]
    environment = {**os.environ, "REFTSERVE_URL": server.url}
    jobs = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=True)
        jobs.append(json.loads(done.stdout))
        assert f"follow it with: reftserve jobs watch {jobs[-1]['id']}" in done.stderr
    assert jobs[0]["training_file"] == jobs[1]["training_file"], "the second start uploads nothing"
    for job in jobs:
        run("jobs", "watch", job["id"])


def test_a_conversation_ends_quietly_with_its_input(run, server: RunningServer) -> None:  # type: ignore[no-untyped-def]
    assert run("chat", stdin="") == ""
    environment = {**os.environ, "REFTSERVE_URL": server.url}
    closed = subprocess.run(
        ["bash", "-c", f"{REFTSERVE} chat <&-"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_ctrl_c_ends_a_conversation_quietly() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [str(REFTSERVE), "chat"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        # As a shell does; SIGINT may be ignored if these tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    shown = b""
    while not shown.endswith(b"> "):
        shown += os.read(leader, 100)
    deadline = time.monotonic() + 30
    # A signal between the prompt and the read that follows is only seen by the next one.
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(1) == 0
    shown += os.read(leader, 1000)
    os.close(leader)
    assert shown.decode().split() == [">"]


def test_an_ascii_locale_can_upload_and_show_every_text(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    data = tmp_path / "m\N{LATIN SMALL LETTER U WITH DIAERESIS}ller.jsonl"
    data.write_bytes(chat_lines(24))
    file = json.loads(run("--json", "files", "upload", str(data), **ascii_only))
    assert file["filename"] == data.name
    assert data.name in run("files", "show", file["id"], **ascii_only)
    said = run("chat", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "--max-tokens", "8", "--seed", "1", **ascii_only)
    assert said == run("chat", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "--max-tokens", "8", "--seed", "1")


@pytest.mark.parametrize(
    ("words", "url", "expected"),
    [
        (["files", "upload", "."], "http://127.0.0.1:9", "error: .: Is a directory"),
        (["files", "list"], "http://127.0.0.1:notaport", "error: the address 'http://127.0.0.1:notaport' is wrong"),
        (["files", "list"], "127.0.0.1:9/v1", "error: no answer from the server at http://127.0.0.1:9"),
        (["generate", "-", "--url", "[::1]:9"], "http://x", "error: no answer from the server at http://[::1]:9"),
        (["interventions", "upload", "n", "absent"], "http://127.0.0.1:9", "error: absent: No such file or directory"),
        (["interventions", "upload", "n", "."], "http://127.0.0.1:9", "error: manifest.json: No such file or"),
        (["train", ".", "--name", "n"], "http://127.0.0.1:9", "error: .: Is a directory"),
        (["eval", "absent.jsonl"], "http://127.0.0.1:9", "error: absent.jsonl: No such file or directory"),
        (["files", "check", "absent.jsonl/x"], "http://127.0.0.1:9", "error: absent.jsonl/x: No such file"),
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
