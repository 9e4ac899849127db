"""Hostile data files: small ones that would unfold to much, and long or deep ones. Each error names the bound."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from reftserve.server.datasets import ChatPrompt, count_examples, limits, read_examples
from reftserve.server.errors import InvalidRequest

ROW = '{"prompt": "a", "completion": "b"}\n'
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def refused(path: Path, filename: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        count_examples(path, filename)
    assert caught.value.code == "invalid_data"
    assert len(caught.value.message) < 1200


def chat(turns: int) -> str:
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": pair * (turns // 2)})


def one_conversation(messages: pa.Array) -> pa.Table:
    return pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, len(messages)], pa.int32()), messages)})


def equal_messages(count: int) -> pa.Array:
    columns = [pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [text]) for text in ("user", "a")]
    return pa.StructArray.from_arrays(columns, ["role", "content"])


@pytest.mark.parametrize("messages", [pa.nulls(3_000_000, MESSAGE), equal_messages(300_000)], ids=["nulls", "equal"])
def test_a_kilobyte_of_parquet_with_a_list_of_millions_is_refused(tmp_path: Path, messages: pa.Array) -> None:
    path = tmp_path / "set"
    parquet.write_table(one_conversation(messages), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    refused(path, "set.parquet", f"row 1: field messages: {len(messages)} messages; .* at most {limits.MAX_TURNS}")


def test_lists_within_fields_of_a_message_are_bounded_too(tmp_path: Path) -> None:
    calls = pa.ListArray.from_arrays(pa.array([0, 5_000_000, 5_000_000], pa.int32()), pa.nulls(5_000_000, pa.int8()))
    messages = pa.StructArray.from_arrays([pa.array(["user", "assistant"]), calls], ["role", "calls"])
    parquet.write_table(one_conversation(messages), tmp_path / "set", compression="zstd")
    refused(tmp_path / "set", "set.parquet", f"unfolds to more than {limits.ALWAYS_UNPACKED_BYTES} bytes")


def test_a_table_of_a_million_null_rows_is_refused(tmp_path: Path) -> None:
    nulls = pa.nulls(limits.MAX_EXAMPLES + 1, pa.string())
    parquet.write_table(pa.table({"prompt": nulls, "completion": nulls}), tmp_path / "set")
    refused(tmp_path / "set", "set.parquet", "the table has 1000001 rows; at most 1000000")


@pytest.mark.parametrize("first", ["prompt,completion", "a,b"])
def test_a_csv_of_many_columns_is_refused(tmp_path: Path, first: str) -> None:
    (tmp_path / "set").write_text(first + ",c" * 100_000 + "\n" + "x," * 100_001 + "x\n")
    refused(tmp_path / "set", "set.csv", "the table has 100002 columns; at most 64 are read")


def test_a_parquet_of_many_columns_is_refused(tmp_path: Path) -> None:
    names = ["prompt", "completion", *map(str, range(2000))]
    parquet.write_table(pa.table({name: ["a"] for name in names}), tmp_path / "set")
    refused(tmp_path / "set", "set.parquet", "the table has 2002 columns; at most 64 are read")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [' + ",".join(["{}"] * 1_000_000) + "]}", "line 1: field messages: 1000000 messages; .* 2000"),
        (chat(12_000), "line 1: field messages: 12000 messages; a conversation has .* at most 2000"),
        ('{"a":' * 500_000, "line 1: JSON that is nested too deeply"),
        ('{"prompt": ' + "[" * 500_000, "line 1: JSON that is nested too deeply"),
        ('{"prompt": [' + "[]," * 500_000 + "[]]}", "line 1: field completion is missing"),
        ("{" + ",".join(f'"k{n}": 0' for n in range(200_000)) + "}", "line 1: field messages is missing: found 'k0', "),
        (
            json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1001}] * 2}),
            "line 1: field messages.0.content: 1001 parts; at most 1000",
        ),
        ('{"prompt": "' + "a" * (2 * limits.MAX_ROW_CHARACTERS), "line 1: more than 4194304 characters"),
        ("\n" * (limits.MAX_BLANKS + 1), "more than 1048576 blanks"),
    ],
    ids=["empty messages", "turns", "deep", "deep list", "lists", "keys", "parts", "long", "blank"],
)
def test_a_hostile_line_of_json_is_refused_by_its_bound(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "set").write_text(line)
    refused(tmp_path / "set", "set.jsonl", says)
    if not line.isspace():
        (tmp_path / "set").write_text(f"[{line}]")
        refused(tmp_path / "set", "set.json", says.replace("line 1", "row 1"))


def test_a_row_in_an_array_may_take_as_many_characters_as_a_line(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a" * (limits.MAX_ROW_CHARACTERS - 100), "completion": "b"})
    for name, content in (("set.json", f"[{row}, {row}]"), ("set.jsonl", f"{row}\n{row}")):
        (tmp_path / name).write_text(content)
        assert count_examples(tmp_path / name, name) == 2


def test_more_examples_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reftserve.server.datasets.reading.MAX_EXAMPLES", 3)
    (tmp_path / "set").write_text(ROW * 3)
    assert count_examples(tmp_path / "set") == 3
    (tmp_path / "set").write_text(ROW * 4)
    refused(tmp_path / "set", "set.jsonl", "line 4: more than 3 examples")


@pytest.mark.parametrize("content", [b" ", b"\n", ROW.encode()], ids=["blanks", "lines", "rows"])
def test_a_compressed_file_unpacks_to_a_hundred_times_its_size_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(limits, "ALWAYS_UNPACKED_BYTES", 1 << 20)
    repeated = content * ((8 << 20) // len(content))
    (tmp_path / "set.gz").write_bytes(gzip.compress(repeated))
    (tmp_path / "set.zst").write_bytes(pa.compress(repeated, "zstd", asbytes=True))
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set.jsonl", repeated)
    for name in ("set.gz", "set.zst", "set.zip"):
        refused(tmp_path / name, name, "unpacks to more than|more than .* characters|blanks outside")


def test_a_zip_of_many_files_is_refused_without_unpacking_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for number in range(5000):
            archive.writestr(str(number), "")
    refused(tmp_path / "set.zip", "set.zip", "the zip holds 5000 files")


def test_the_prompts_of_a_conversation_are_bounded_together(tmp_path: Path) -> None:
    long = {"role": "user", "content": "a" * 40_000}
    answers = [{"role": "assistant", "content": "b", "weight": weight} for weight in (0, 1)]
    (tmp_path / "set").write_text(json.dumps({"messages": [long, answers[1]] * 45}))
    refused(tmp_path / "set", "set.jsonl", "line 1: field messages: the prompts of its 45 answers have 41400990 char")
    (tmp_path / "set").write_text(json.dumps({"messages": [long, answers[0]] * 44 + [long, answers[1]]}))
    assert count_examples(tmp_path / "set") == 1


def test_the_examples_of_a_conversation_share_its_turns(tmp_path: Path) -> None:
    (tmp_path / "set").write_text(chat(limits.MAX_TURNS))
    examples = read_examples(tmp_path / "set")
    assert len(examples) == limits.MAX_TURNS // 2
    prompts: list[Any] = [example.prompt for example in examples]
    assert all(isinstance(prompt, ChatPrompt) for prompt in prompts)
    assert len({id(prompt.conversation) for prompt in prompts}) == 1
    assert [prompt.length for prompt in prompts] == list(range(1, limits.MAX_TURNS, 2))


DAY_MS = 86_400_000
ONE = pa.array([1], pa.int64())


@pytest.mark.parametrize(
    "values",
    [
        ONE.cast(pa.timestamp("ns")),
        ONE.cast(pa.time64("ns")),
        ONE.cast(pa.duration("ns")),
        pa.array([DAY_MS]).cast(pa.date64()),
        pa.array(["1.5"]).cast(pa.decimal128(10, 2)),
        pa.nulls(1, pa.map_(pa.string(), pa.string())),
        pa.array([b"a"]),
    ],
    ids=lambda values: str(values.type),
)
def test_a_column_is_judged_by_its_type_before_a_row_is_read(tmp_path: Path, values: pa.Array) -> None:
    parquet.write_table(pa.table({"prompt": values, "completion": ["c"]}), tmp_path / "set")
    refused(tmp_path / "set", "set.parquet", r"column 'prompt' has type .+; expected string")
    messages = pa.StructArray.from_arrays([pa.array(["user"]), values], ["role", "at"])
    parquet.write_table(one_conversation(messages), tmp_path / "set")
    refused(tmp_path / "set", "set.parquet", r"column 'messages.at' has type .+; expected no such field")


@pytest.mark.parametrize(
    "values",
    [ONE, pa.array([1.5]), pa.array([True]), pa.array([["a"]]), pa.array([{"a": "b"}])],
    ids=lambda values: str(values.type),
)
def test_a_plain_type_that_is_no_text_is_refused_by_name(tmp_path: Path, values: pa.Array) -> None:
    parquet.write_table(pa.table({"prompt": ["a"], "completion": values}), tmp_path / "set")
    refused(tmp_path / "set", "set.parquet", r"column 'completion' has type .+; expected string")
    parquet.write_table(pa.table({"messages": values}), tmp_path / "set")
    refused(tmp_path / "set", "set.parquet", r"column 'messages' has type .+; expected list<struct<role: string")
