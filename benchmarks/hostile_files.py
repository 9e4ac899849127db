"""Check mutated data files as an upload does: `python benchmarks/hostile_files.py [--count 500] [--seed 0]`.

Good files of each format have bytes flipped, cut out, repeated and spliced. A mutant that is accepted must hold the
rows that an independent reader finds: json, csv or pyarrow, without our code. Prints the number refused and accepted,
the wrong ones, and the greatest time of processor and memory of a check.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from reftserve.server.datasets import ChatPrompt, Instruction, read_examples
from reftserve.server.datasets.check import check_data_set
from reftserve.server.errors import InvalidRequest

TURNS = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A check's result. kind: "accepted", "refused", or the name of an exception that is no refusal."""

    kind: str
    cpu_s: float
    message: str


def chats() -> list[Row]:
    turns = [[("user", f"is {n} odd?"), ("assistant", "yes" if n % 2 else "no")] * TURNS for n in range(20)]
    return [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]


def completions() -> list[Row]:
    return [{"prompt": f'{n} + "1", straße\n= ', "completion": f"{n + 1};"} for n in range(40)]


def lines(rows: list[Row]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def array(rows: list[Row]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def table(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})
    return text.getvalue().encode()


def packed_columns(rows: list[Row], compression: str = "zstd") -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer, compression=compression)
    return buffer.getvalue()


def good_files() -> dict[str, tuple[str, bytes]]:
    """Return a file's name and bytes for each format."""
    return {
        "JSON Lines": ("set.jsonl", lines(chats())),
        "JSON Lines, completions": ("set.jsonl", lines(completions())),
        "array": ("set.json", array(chats())),
        "CSV": ("set.csv", table(completions())),
        "CSV, chats": ("set.csv", table(chats())),
        "CSV, semicolons": ("set.csv", table(completions(), ";")),
        "Parquet": ("set.parquet", packed_columns(completions())),
        "Parquet, chats": ("set.parquet", packed_columns(chats(), "none")),
        "gzip": ("set.jsonl.gz", gzip.compress(lines(completions()), mtime=0)),
        "UTF-16": ("set.csv", table(completions()).decode().encode("utf-16")),
    }


def mutant(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return the content with one to four random faults."""
    marks = (b'"', b",", b"\n", b"\0", b"{", b"]", b"\r", b"\xff", b"\xef\xbb\xbf", b";")
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        start = chance.randrange(len(data) or 1)
        end = start + chance.choice((1, 8, 200))
        fault = chance.randrange(5)
        if fault == 0:
            data[start : start + 1] = bytes([chance.randrange(256)])
        elif fault == 1:
            del data[start:end]
        elif fault == 2:
            data[start:start] = data[start:end] * chance.choice((1, 2, 50))
        elif fault == 3:
            begin = chance.randrange(len(other))
            data[start:end] = other[begin : begin + end - start]
        else:
            data[start:start] = chance.choice(marks)
    return bytes(data)


def checked(path: Path, filename: str) -> Outcome:
    """Check a file as an upload does, and measure the processor time of the check's process."""
    before = _children_cpu_s()
    kind, message = "accepted", ""
    try:
        check_data_set(path, filename)
    except InvalidRequest as cause:
        kind, message = "refused", cause.message
    except Exception as cause:  # what this script looks for
        kind, message = type(cause).__name__, str(cause)
    return Outcome(kind, _children_cpu_s() - before, message)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(path: Path, filename: str) -> list[Any]:
    """Return each row as our readers understand it: the texts of its turns, or prompt and answer."""
    rows: dict[int, Any] = {}
    for example in read_examples(path, filename):
        prompt: Any = example.prompt
        if isinstance(prompt, ChatPrompt):
            rows[example.location.number] = [(turn.role, turn.text) for turn in prompt.conversation]
        elif isinstance(prompt, Instruction):
            rows[example.location.number] = [prompt.instruction, prompt.input, example.target]
        else:
            rows[example.location.number] = [prompt, example.target]
    return list(rows.values())


def theirs(content: bytes, filename: str) -> list[Any]:
    """Return the same of an independent reader."""
    if filename.endswith(".gz"):
        content, filename = gzip.decompress(content), filename.removesuffix(".gz")
    if content.startswith(b"PAR1"):
        return [_values(row) for row in parquet.read_table(io.BytesIO(content)).to_pylist()]
    return [_values(row) for row in _rows(content, filename)]


def _rows(content: bytes, filename: str) -> Iterator[Row]:
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    first = text.lstrip()[:1]
    if first == "[":
        yield from json.loads(text)
    elif first == "{" or filename.endswith((".json", ".jsonl")):
        yield from (json.loads(line) for line in text.replace("\r", "\n").split("\n") if line.strip())
    else:
        text = text.lstrip("\r\n")
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=partial(_known, text)))


def _known(text: str, delimiter: str) -> int:
    names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    return len({"prompt", "completion", "messages"}.intersection(names))


def _values(row: Row) -> list[Any]:
    if row.get("messages") is not None:
        messages = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]
        return [(message["role"], message["content"] or "") for message in messages]
    if row.get("prompt") is not None:
        return [row["prompt"], row["completion"]]
    return [row["instruction"], row.get("input") or "", row["output"]]


def mutants(count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield a format, a file's name and a mutant's bytes, in turn of the formats."""
    chance = random.Random(seed)  # noqa: S311 - reproducible faults
    files = list(good_files().items())
    for number in range(count):
        kind, (filename, content) = files[number % len(files)]
        yield kind, filename, mutant(content, chance.choice(files)[1][1], chance)


def is_right(path: Path, filename: str, content: bytes) -> bool:
    """Return whether an accepted file's rows are those that the independent reader finds."""
    return ours(path, filename) == theirs(content, filename)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--count", type=int, default=500)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    found: list[tuple[str, Outcome]] = []
    wrong = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, filename, content) in enumerate(mutants(args.count, args.seed)):
            path = Path(folder, "upload")
            path.write_bytes(content)
            outcome = checked(path, filename)
            found.append((kind, outcome))
            if outcome.kind not in ("accepted", "refused"):
                print(f"{number}: {kind}: {outcome.kind}: {outcome.message[-500:]}")
            elif outcome.kind == "accepted" and not is_right(path, filename, content):
                wrong += 1
                print(f"{number}: {kind}: accepted with other rows than an independent reader's")
    for kind in good_files():
        outcomes = [outcome for name, outcome in found if name == kind]
        if outcomes:
            accepted = sum(outcome.kind == "accepted" for outcome in outcomes)
            print(
                f"{kind:24} {len(outcomes):4} files  {accepted:4} accepted  "
                f"cpu <= {max(outcome.cpu_s for outcome in outcomes):.2f} s"
            )
    crashes = sum(outcome.kind not in ("accepted", "refused") for _, outcome in found)
    signals = sum(" ended the process " in outcome.message for _, outcome in found)
    print(
        f"{len(found)} files in {time.monotonic() - began:.0f} s: {crashes} crashes, {wrong} accepted wrongly, "
        f"{signals} refused because a reader's crash ended the check; "
        f"memory <= {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10} MB"
    )
    sys.exit(bool(crashes or wrong))


if __name__ == "__main__":
    main()
