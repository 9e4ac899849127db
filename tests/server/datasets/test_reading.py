"""Data sets in every format: equal rows give equal examples, and errors give their location."""

from __future__ import annotations

import csv
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from reftserve.server.datasets import count_examples, limits, parquet_rows, read_examples
from reftserve.server.errors import InvalidRequest

Row = dict[str, Any]
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
COMPLETIONS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(200)]

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
said = text.filter(str.strip)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": said}), min_size=1)
chat_rows = st.builds(lambda turns, last: {"messages": [*turns, {"role": "assistant", "content": last}]}, turns, said)
completion_rows = st.fixed_dictionaries({"prompt": said, "completion": said})
instruction_rows = st.fixed_dictionaries({"instruction": said, "input": text, "output": said})
data_sets = st.one_of(st.lists(kind, min_size=1, max_size=6) for kind in (chat_rows, completion_rows, instruction_rows))


def write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_array(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({n: json.dumps(v) if isinstance(v, list) else v for n, v in row.items()})


def write_parquet(path: Path, rows: list[Row], **options: Any) -> None:
    schema = pa.schema([(name, MESSAGES if name == "messages" else pa.string()) for name in rows[0]])
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, **options)


FORMATS = {"set.jsonl": write_lines, "set.json": write_array, "set.csv": write_csv, "set.parquet": write_parquet}


@given(rows=data_sets)
def test_the_same_rows_are_the_same_examples_in_every_format(rows: list[Row]) -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for filename, write in FORMATS.items():
            path = Path(folder, "upload")
            write(path, rows)
            examples = read_examples(path, filename)
            assert examples == read_examples(path), "content alone says which format it is"
            header = filename == "set.csv"
            found.append([(example.location.number - header, example.prompt, example.target) for example in examples])
    assert found[0]
    assert all(examples == found[0] for examples in found)


def test_rows_of_different_kinds_can_stand_in_one_json_file(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [chat, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    for filename in ("set.jsonl", "set.json"):
        FORMATS[filename](tmp_path / filename, rows)
        assert [example.target for example in read_examples(tmp_path / filename, filename)] == ["b"] * 3


def test_a_null_field_does_not_determine_a_rows_kind(tmp_path: Path) -> None:
    row = {"messages": None, "instruction": None, "prompt": "a", "completion": "b"}
    write_lines(tmp_path / "rows.jsonl", [row])
    (example,) = read_examples(tmp_path / "rows.jsonl")
    assert (example.prompt, example.target) == ("a", "b")


def test_a_byte_order_mark_and_blank_lines_are_no_error(tmp_path: Path) -> None:
    row = json.dumps(COMPLETIONS[0])
    for filename, content in (
        ("set.jsonl", f"\ufeff{row}\n\n{row}\n"),
        ("set.json", f"\ufeff\n [{row},\r\n{row} ]\n"),
        ("set.csv", "\ufeffprompt,completion\n0+1=,1\n\n0+1=,1\n"),
    ):
        (tmp_path / "upload").write_text(content, encoding="utf-8")
        assert count_examples(tmp_path / "upload", filename) == 2


def test_a_conversation_counts_an_example_for_each_assistant_turn(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    write_lines(tmp_path / "upload", [{"messages": turns}] * 3)
    assert count_examples(tmp_path / "upload") == 6
    assert [example.location.number for example in read_examples(tmp_path / "upload")] == [1, 1, 2, 2, 3, 3]


GOOD = b'{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    ("filename", "content", "says"),
    [
        ("set.jsonl", b"", "the file is empty; expected .*instruction"),
        ("set.json", b"[]", "the file is empty"),
        ("set.csv", b" \n", "the file is empty"),
        ("set.csv", b"prompt,completion\n", "the file is empty"),
        ("set.jsonl", b"prompt,completion\na,b\n", "line 1: not JSON"),
        ("set.jsonl", GOOD + b'\n{"prompt": "a"}', "line 2: field completion is missing or null"),
        ("set.jsonl", b'{"prompt": "a", "completion": " \\n"}', "line 1: field completion: empty answer"),
        ("set.jsonl", b'{"instruction": "a", "output": ""}', "line 1: field output: empty answer"),
        ("set.jsonl", b'{"instruction": "a", "output": "b", "inputs": "c"}', "line 1: field inputs"),
        ("set.jsonl", b'{"text": "a"}', "line 1: field messages is missing: found 'text'. Plain text names no prompt"),
        ("set.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1: JSON that cannot be read"),
        ("set.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "the file is UTF-16 without a byte order mark; save it"),
        ("set.json", b"[" + GOOD, "row 2: not JSON"),
        ("set.json", b"[" + GOOD + b" " + GOOD + b"]", "row 2: not JSON"),
        ("set.json", b"[" + GOOD + b",]", "row 2: not JSON"),
        ("set.json", b"[" + GOOD + b"] x", "text follows the JSON array"),
        ("set.json", b"[" + GOOD + b", 3]", "row 2: number; expected an object"),
        ("set.json", b'[{"prompt": "\xff"}]', "not UTF-8 at byte 13"),
        ("set.json", b"[" * 100_000, "row 1: JSON that is nested too deeply"),
        ("set.csv", b"prompt/completion\na/b\n", "the columns are 'prompt/completion'. Expected .*separated by commas"),
        ("set.csv", b"prompt,completion,id\na,b,1\n", "column 'id' is unknown: remove it"),
        ("set.csv", b"prompt,prompt,completion\na,b,c\n", "column 'prompt' occurs twice"),
        ("set.csv", b"instruction,input\na,b\n", "column 'output' is missing"),
        ("set.csv", b"prompt,completion\na,b\na,b,c\n", "row 3: 3 cells, but the header has 2 columns; a cell"),
        ("set.csv", b"prompt,completion\na,b\na,\n", "row 3: field completion: empty answer"),
        ("set.csv", b"prompt,completion\na,\xff\n", "not UTF-8 at byte 20, line 2.*Windows-1252.*CSV UTF-8"),
        ("set.csv", b"prompt,completion\n\xff,b\n", "(?i)utf-?8"),
        ("set.csv", b"pr\xffompt,completion\na,b\n", "(?i)utf-?8"),
        ("set.csv", b'messages\n"[{""role"": "\n', "row 2: field messages: not JSON"),
        ("set.csv", b'messages\n"[{""role"": ""user""}, 3]"\n', "row 2: field messages.0.content is missing or null"),
        ("set.csv", b"prompt,completion\n" + b"a" * (9 << 20) + b",b\n", "a row has more than 4194304 characters"),
        ("set.parquet", GOOD, "not a Parquet file"),
        ("set.parquet", b"PAR1 and nothing behind it", "cannot be read as Parquet"),
    ],
)
def test_an_error_gives_its_location_and_the_expected_value(
    tmp_path: Path, filename: str, content: bytes, says: str
) -> None:
    path = tmp_path / "upload"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=says) as caught:
        count_examples(path, filename)
    assert caught.value.code == "invalid_data"
    assert (caught.value.param or "").startswith("file")
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([("user", "a", None)], "field messages: 1 messages; a conversation has at least 2, a question and its answer"),
        ([("user", "a", None), ("assistant", "b", None), ("user", "c", None)], "field messages.2.role: 'user'"),
        ([("user", "a", 0), ("assistant", "b", None)], "field messages.0.weight: only assistant messages"),
        ([("user", "a", None), ("assistant", "b", 2)], "field messages.1.weight"),
        ([("user", "a", None), ("assistant", "b", 0)], "field messages: nothing to learn"),
        (
            [("user", "a", None), ("assistant", " ", None), ("user", "a", None), ("assistant", "b", None)],
            "field messages.1.content: empty answer",
        ),
    ],
)
def test_an_invalid_turn_is_named(tmp_path: Path, turns: list[tuple[str, str, int | None]], says: str) -> None:
    path = tmp_path / "set.jsonl"
    write_lines(path, [{"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}])
    with pytest.raises(InvalidRequest, match=says):
        count_examples(path)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"prompt": ["a", None], "completion": ["b", "c"]}, "row 2: field prompt"),
        ({"prompt": [1, 2], "completion": ["b", "c"]}, "column 'prompt' has type int64; expected string"),
        ({"prompt": [b"\xff"], "completion": ["b"]}, "column 'prompt' has type binary; expected string"),
        ({"text": ["a"], "label": [1]}, "the columns are 'text', 'label'. Texts and labels: rename"),
        ({"messages": [[{"role": "user", "content": "a", "tool": "b"}] * 2]}, "row 1: field messages.0.tool"),
    ],
)
def test_an_invalid_cell_of_a_parquet_file_is_named(tmp_path: Path, table: dict[str, Any], says: str) -> None:
    path = tmp_path / "set.parquet"
    parquet.write_table(pa.table(table), path)
    with pytest.raises(InvalidRequest, match=says):
        count_examples(path)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@given(data=st.data())
def test_a_damaged_parquet_file_is_refused_or_read_and_never_crashes(compression: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "set.parquet")
        write_parquet(path, COMPLETIONS, compression=compression)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, 2 * len(content)))])
        with suppress(InvalidRequest):
            assert count_examples(path) <= len(COMPLETIONS)


ZSTD_PLAIN: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}


def test_a_small_parquet_file_that_decompresses_to_a_huge_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    long = "x" * (parquet_rows.MAX_CELL_BYTES + 1)
    folded = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), [long])
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 500), folded], ["role", "content"])
    chats = pa.ListArray.from_arrays(pa.array(range(0, 501, 2), pa.int32()), turns)
    for name, table in (
        ("prompt", pa.table({"prompt": folded, "completion": ["b"] * 500})),
        ("messages", pa.table({"messages": chats})),
    ):
        limit = 2 * len(long)
        parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=limit, store_schema=False)
        assert path.stat().st_size < 50_000
        with pytest.raises(InvalidRequest, match=f"column '{name}' has a text of {len(long)} bytes; at most"):
            count_examples(path)
    folded = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), ["x" * 100_000])
    parquet.write_table(pa.table({"prompt": folded, "completion": ["b"] * 5000}), path, store_schema=False)
    assert path.stat().st_size < 50_000
    with pytest.raises(InvalidRequest, match=f"unfolds to more than {limits.ALWAYS_UNPACKED_BYTES} bytes; split it"):
        count_examples(path)
    parquet.write_table(pa.table({"prompt": ["x" * 4_000_000] * 20, "completion": ["b"] * 20}), path, **ZSTD_PLAIN)
    with pytest.raises(InvalidRequest, match=r"the Parquet file unfolds to \d+ bytes; at most 67108864 are read"):
        count_examples(path)
