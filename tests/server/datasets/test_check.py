"""An upload's check: limits on memory and time, and what ends the process that reads the file."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from reftserve.server.datasets import check
from reftserve.server.datasets.check import check_data_set
from reftserve.server.errors import InvalidRequest, Overloaded

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 3
STRUCTS = pa.struct([("role", pa.string()), ("content", pa.string())])


def million_nulls(path: Path) -> None:
    """Write one row: a conversation of five million messages that are null."""
    chats = pa.ListArray.from_arrays(pa.array([0, 5_000_000], pa.int32()), pa.nulls(5_000_000, STRUCTS))
    parquet.write_table(pa.table({"messages": chats}), path, compression="zstd")
    assert path.stat().st_size < 1000


def test_the_examples_of_a_good_file_are_counted(tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(ROWS)
    assert check_data_set(tmp_path / "set", "set.jsonl") == 3


def test_an_error_crosses_the_process_whole(tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(ROWS + b"{")
    with pytest.raises(InvalidRequest, match="line 4: not JSON") as caught:
        check_data_set(tmp_path / "set", "set.jsonl")
    assert (caught.value.param, caught.value.code) == ("file.line.4", "invalid_data")


def test_a_file_that_takes_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    million_nulls(tmp_path / "set")
    monkeypatch.setattr(check, "MEMORY_BYTES", 96 << 20)
    with pytest.raises(InvalidRequest, match="takes more than 96 MiB of memory") as caught:
        check_data_set(tmp_path / "set", "set.parquet")
    assert caught.value.code == "invalid_data"


def test_a_file_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gzip.open(tmp_path / "set", "wb") as file:
        file.write(ROWS * 300_000)
    monkeypatch.setattr(check, "CPU_S", 1)
    with pytest.raises(InvalidRequest, match="took more than 1 s") as caught:
        check_data_set(tmp_path / "set", "set.jsonl.gz")
    assert caught.value.code == "invalid_data"


def test_a_check_that_sleeps_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "set")  # opening it waits for a writer, as a dead network folder does
    monkeypatch.setattr(check, "CPU_S", 1)
    monkeypatch.setattr(check, "WALL_PER_CPU", 1)
    with pytest.raises(InvalidRequest, match="took more than 1 s"):
        check_data_set(tmp_path / "set", "set.jsonl")


@pytest.mark.parametrize("name", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_of_a_reader_ends_the_check_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: signal.Signals
) -> None:
    (tmp_path / "set").write_bytes(ROWS)
    crash = f"import os; os.kill(os.getpid(), {int(name)})"

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        return REAL_RUN([sys.executable, "-c", crash], **options)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InvalidRequest, match=f"cannot be read: {name.name} ended the process"):
        check_data_set(tmp_path / "set", "set.jsonl")


REAL_RUN = subprocess.run


def test_a_fault_of_our_own_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").write_bytes(ROWS)
    monkeypatch.setattr(check, "MEMORY_BYTES", "many")
    with pytest.raises(RuntimeError, match="TypeError"):
        check_data_set(tmp_path / "set", "set.jsonl")


def test_a_module_in_the_working_folder_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").write_bytes(ROWS)
    (tmp_path / "random.py").write_text("raise SystemExit('random.py was imported')")
    (tmp_path / "json.py").write_text("raise SystemExit('json.py was imported')")
    monkeypatch.chdir(tmp_path)
    assert check_data_set(tmp_path / "set", "set.jsonl") == 3


def test_more_uploads_than_checks_wait_and_are_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").write_bytes(ROWS)
    monkeypatch.setattr(check, "WAIT_S", 0.01)
    for _ in range(check.MAX_CHECKS):
        check._SLOTS.acquire()
    try:
        with pytest.raises(Overloaded) as caught:
            check_data_set(tmp_path / "set", "set.jsonl")
    finally:
        for _ in range(check.MAX_CHECKS):
            check._SLOTS.release()
    assert caught.value.retry_after_s == 0.01
    assert check_data_set(tmp_path / "set", "set.jsonl") == 3


def test_the_check_loads_neither_the_tokenizer_nor_the_wire_types() -> None:
    code = (
        "import sys, json, reftserve.server.datasets.check_process, reftserve.server.datasets.reading; "
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True).stdout
    heavy = {"pydantic", "tokenizers", "jinja2", "torch", "pyarrow", "numpy", "sqlalchemy", "fastapi"}
    assert heavy.isdisjoint(json.loads(loaded))


def test_a_reader_of_hostile_rows_leaves_the_interpreter_to_other_threads(tmp_path: Path) -> None:
    (tmp_path / "set").write_text('{"messages": [' + ",".join(["{}"] * 1_000_000) + "]}")
    began = time.thread_time()
    with pytest.raises(InvalidRequest, match="1000000 messages"):
        check_data_set(tmp_path / "set", "set.jsonl")
    assert time.thread_time() - began < 0.2, "this thread only waits"
