"""What a machine gives: each lack ends in one sentence that says what to set, and `doctor` names all of them."""

from __future__ import annotations

import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from reftserve.server import doctor
from reftserve.server.environment import check_database, check_environment, check_store, check_temporary_folder
from reftserve.server.errors import ServerError
from reftserve.server.settings import Settings

COMMANDS = [sys.executable, "-m", "reftserve.server.commands"]
SQLITE = b"SQLite format 3\0"


def sentence(words: list[str], **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([*COMMANDS, *words], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (a_file, "is, or lies below, a file; set --data to a folder"),
        (lambda folder: a_file(folder) / "below", "is, or lies below, a file; set --data to a folder"),
        (lambda _: Path("/proc/reftserve"), "cannot be written .*make it writable for user .*or set --data"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_data_folder_that_cannot_be_one_ends_in_one_sentence(
    command: str, place: Callable[[Path], Path], reason: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    data = place(tmp_path)
    flags = [command, "--model", str(tiny_llama_folder), "--data", str(data)]
    with pytest.raises(ServerError, match=reason) as found:
        check_environment(Settings(data=data))
    assert sentence(flags) == f"error: {found.value}"


@pytest.mark.parametrize("content", [b"no database at all, but a text", SQLITE + b"\xff" * 5000])
def test_a_damaged_database_ends_in_one_sentence(content: bytes, tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "reftserve.db"
    file.write_bytes(content)
    said = sentence(["serve", "--model", str(tiny_llama_folder), "--data", str(tmp_path)])
    assert f"the database {file} is damaged: " in said
    assert "put a backup in its place" in said
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "Could not parse SQLAlchemy URL .*check --database-url"),
        ("oracle9://host/db", "Can't load plugin.*check --database-url"),
        ("postgresql+psycopg://nobody@127.0.0.1:9/db", "127.0.0.1.*check --database-url"),
    ],
)
def test_a_database_that_cannot_be_reached_is_named(url: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=reason) as found:
        check_database(Settings(data=tmp_path, database_url=url))
    assert "\n" not in str(found.value)


def test_a_missing_driver_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ServerError, match=r"pip install 'reftserve\[postgres\]'"):
        check_database(Settings(data=tmp_path, database_url="postgresql+psycopg://host/db"))


def test_postgresql_without_a_driver_names_the_one_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(ServerError, match=r"write postgresql\+psycopg://"):
        check_database(Settings(data=tmp_path, database_url="postgresql+psycopg2://host/db"))


def test_a_locked_database_is_called_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *words, **options: connect(*words, **options, timeout=0))
    with closing(connect(tmp_path / "reftserve.db")) as writer:
        writer.execute("CREATE TABLE rows (number INTEGER)")
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ServerError, match=r"reftserve\.db is locked: another process"):
            check_database(Settings(data=tmp_path))


@pytest.mark.parametrize("url", ["nonsense://bucket", "s3://bucket"])
def test_a_store_whose_package_is_missing_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ServerError, match=f"the store {url.split(':')[0]}:// cannot be used.*check --blob-url"):
        check_store(Settings(data=tmp_path, blob_url=url))


def test_the_temporary_folder_is_named_with_the_reason_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert f"because TMPDIR ({tmp_path}/absent) cannot be written" in check_temporary_folder(Settings())
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(ServerError, match="set TMPDIR"):
        check_temporary_folder(Settings())


def outcomes(settings: Settings, *names: str) -> list[tuple[str, str]]:
    return [doctor.examine(doctor.checks()[name], settings) for name in names]


def test_doctor_notes_each_drawback_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("REFTSERVE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1080")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("locale.getencoding", lambda: "ANSI_X3.4-1968")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    expected = {
        "variables": ("ok", "REFTSERVE_PORT ignored"),
        "PATH": ("note", "install g++"),
        "HOME": ("note", "set HOME, or HF_HOME"),
        "user": ("ok", "without a name"),
        "locale": ("note", "set PYTHONUTF8=1"),
        "TMPDIR's length": ("note", "set TMPDIR to a path of at most"),
        "disk space": ("note", "0.0 GiB in"),
        "open files": ("note", "at most 1024.*ulimit -n"),
        "proxies": ("note", r"pip install 'httpx\[socks\]'"),
    }
    found = outcomes(Settings(data=tmp_path), *expected)
    for (name, (outcome, text)), (is_outcome, is_text) in zip(expected.items(), found, strict=True):
        assert is_outcome == outcome, (name, is_text)
        assert re.search(text, is_text), (name, is_text)
    monkeypatch.delenv("PATH")
    monkeypatch.delenv("HOME")
    for (_, text), said in zip(outcomes(Settings(data=tmp_path), "PATH", "HOME"), ("not set", "set HOME"), strict=True):
        assert said in text


def test_doctor_finds_each_fault(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = a_file(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(
            data=file,
            database_url=f"sqlite:///{tiny_llama_folder}/tokenizer.json",
            blob_url="nonsense://x",
            model=str(tmp_path / "none"),
            host="127.0.0.1",
            port=taken.getsockname()[1],
        )
        names = ("data folder", "database", "store", "port", "base model")
        for name, (outcome, text) in zip(names, outcomes(settings, *names), strict=True):
            assert outcome == "wrong", name
            assert text
            assert "\n" not in text


def test_doctor_prints_one_line_for_each_check(tiny_llama_folder: Path, tmp_path: Path) -> None:
    flags = ["doctor", "--model", str(tiny_llama_folder), "--data", str(tmp_path), "--port", "0"]
    environment = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run([*COMMANDS, *flags], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0][6:] for line in done.stdout.splitlines()] == list(doctor.checks())
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
