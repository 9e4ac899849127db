"""Mutated data files of each format: refused, or read as an independent reader reads them; never another exception."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import hostile_files
import pytest

from reftserve.server.datasets import count_examples
from reftserve.server.errors import InvalidRequest

COUNT = 500


@pytest.mark.parametrize("kind", list(hostile_files.good_files()))
def test_a_good_file_is_read_as_by_the_independent_reader(tmp_path: Path, kind: str) -> None:
    filename, content = hostile_files.good_files()[kind]
    (tmp_path / "set").write_bytes(content)
    assert count_examples(tmp_path / "set", filename) >= 20
    assert hostile_files.is_right(tmp_path / "set", filename, content)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mutated_file_is_refused_or_read_as_by_an_independent_reader(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "set"
    found: Counter[str] = Counter()
    for kind, filename, content in hostile_files.mutants(COUNT, seed):
        if kind.startswith("Parquet"):
            continue  # Arrow may end the process; test_reading damages some, the benchmark all in a child
        path.write_bytes(content)
        message = _refusal(path, filename)
        if message is None:
            assert hostile_files.is_right(path, filename, content), (kind, content)
        else:
            assert len(message) < 1500, kind
            assert message.isprintable(), kind
        found["accepted" if message is None else "refused"] += 1
    assert min(found["accepted"], found["refused"]) > COUNT // 20, found


def _refusal(path: Path, filename: str) -> str | None:
    try:
        count_examples(path, filename)
    except InvalidRequest as cause:
        return cause.message
    return None
