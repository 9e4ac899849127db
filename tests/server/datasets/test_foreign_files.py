"""Files of Excel, pandas and other tools: read where they mean one thing, else refused with the cause and the cure."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from reftserve.server.datasets import ChatPrompt, Example, Turn, count_examples, read_examples
from reftserve.server.errors import InvalidRequest

TABLE = "prompt,completion\r\nhow many?,two\r\nweiß,müde\r\n"
LINES = '{"prompt": "how many?", "completion": "two"}\n{"prompt": "weiß", "completion": "müde"}\n'
PAIRS = [("how many?", "two"), ("weiß", "müde")]


def examples(path: Path, filename: str) -> list[Example]:
    found = read_examples(path, filename)
    assert found == read_examples(path), "later readers do not know the file's name"
    return found


def pairs(path: Path, filename: str) -> list[tuple[Any, str]]:
    return [(example.prompt, example.target) for example in examples(path, filename)]


def refused(path: Path, filename: str, says: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest, match=says) as caught:
        count_examples(path, filename)
    assert caught.value.code == "invalid_data"
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()
    return caught.value


def zipped(content: bytes, *names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names or ("set.csv",):
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("filename", "content"),
    [
        ("set.csv", TABLE.encode("utf-8-sig")),
        ("set.csv", TABLE.encode("utf-16")),
        ("set.csv", TABLE.encode("utf-32")),
        ("set.csv", TABLE.replace(",", ";").encode("utf-8-sig")),
        ("set.csv", TABLE.replace(",", "\t").encode("utf-16")),  # Excel's "Unicode text"
        ("set.tsv", TABLE.replace(",", "\t").encode()),
        ("set.csv", ("sep=;\r\n" + TABLE.replace(",", ";")).encode()),
        ("set.csv", ("sep=,\n" + TABLE).encode()),
        ("set.csv", TABLE.replace("\r\n", "\r").encode()),
        ("set.csv", ("\r\n\r\n" + TABLE).encode()),
        ("set.csv", TABLE.replace("\r", ",,\r").encode()),  # Excel's empty columns
        ("set.jsonl", LINES.encode("utf-16")),
        ("set.jsonl", LINES.replace("\n", "\r").encode()),
        ("set.jsonl", LINES.replace("\n", "\r\n\r\n").encode("utf-8-sig")),
        ("set.jsonl.gz", gzip.compress(LINES.encode())),
        ("set.csv.gz", gzip.compress(TABLE.encode("utf-16"))),
        ("set.jsonl.zst", pa.compress(LINES.encode(), "zstd", asbytes=True)),
        ("set.zip", zipped(TABLE.encode())),
        ("set.zip", zipped(LINES.encode(), "folder/set.jsonl")),
    ],
)
def test_a_file_that_can_mean_one_thing_only_is_read(tmp_path: Path, filename: str, content: bytes) -> None:
    (tmp_path / "set").write_bytes(content)
    assert pairs(tmp_path / "set", filename) == PAIRS


def test_a_mac_archives_hidden_files_do_not_count(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("set.csv", TABLE)
        archive.writestr("__MACOSX/._set.csv", b"\0")
    (tmp_path / "set").write_bytes(buffer.getvalue())
    assert pairs(tmp_path / "set", "set.zip") == PAIRS


@pytest.mark.parametrize(
    ("filename", "content", "says"),
    [
        ("set.xlsx", zipped(b"", "[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook: .* 'CSV UTF-8"),
        ("set.docx", zipped(b"", "[Content_Types].xml", "word/document.xml"), "an Office document; expected JSON"),
        (
            "set.xls",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
            r"an Excel workbook of the old kind .* 'CSV UTF-8'",
        ),
        (
            "set.csv",
            TABLE.encode("windows-1252"),
            "not UTF-8 at byte 37, line 3. .*Windows-1252: save it as 'CSV",
        ),
        ("set.jsonl", LINES.encode("windows-1252"), "not UTF-8 at byte 60, line 2. .*iconv"),
        ("set.csv", TABLE.encode("utf-16-le"), "UTF-16 without a byte order mark; save it as UTF-8"),
        ("set.csv", TABLE.encode("utf-16-be"), "UTF-16 without a byte order mark; save it as UTF-8"),
        ("set.csv", TABLE.encode("utf-16")[:-1], "the file is damaged: not UTF-16 at byte"),
        ("set.csv", bytes(range(256)) * 9, "the file is no text: it holds zero bytes"),
        ("set.pdf", b"%PDF-1.7\n%\xe2\xe3", "the file is a PDF; expected JSON Lines"),
        ("set.bz2", b"BZh91AY&SY", "a bzip2 file; unpack it first"),
        ("set.pkl", b"\x80\x04\x95\x10\0\0\0", "a pickle or another binary file"),
        ("set.arrow", b"ARROW1\0\0", "an Arrow file; write it with `to_parquet`"),
        ("set.jsonl", b"<!DOCTYPE html><html>", "a web page, perhaps in place of a download"),
        ("set.gz", gzip.compress(LINES.encode())[:-9], "the gzip file is damaged or cut short"),
        ("set.zst", pa.compress(LINES.encode(), "zstd", asbytes=True)[:-9], "the zstd file is damaged or cut short"),
        ("set.zip", zipped(TABLE.encode())[:-9], "the zip file is damaged or cut short"),
        ("set.zip", zipped(TABLE.encode(), "a.csv", "b.csv"), "the zip holds 2 files; expected one data file"),
        ("set.gz", gzip.compress(gzip.compress(b"a")), "a packed file in gzip; pack it once"),
        ("set.gz", gzip.compress(b"PAR1" + b"\0" * 20), "a Parquet file in gzip: .* upload it alone"),
        # pandas' index, with and without a name, and other columns
        (
            "set.csv",
            b",prompt,completion\n0,a,b\n",
            r"column '' is unknown: it looks like pandas' index; .*index=False",
        ),
        ("set.csv", b"Unnamed: 0,prompt,completion\n0,a,b\n", "column 'Unnamed: 0' is unknown: .* pandas' index"),
        ("set.csv", b"id,prompt,completion,b,c\n0,a,b,,3\n", "columns 'id', 'b', 'c' are unknown: remove them"),
        ("set.csv", b"Prompt,Completion\na,b\n", "Rename 'Prompt' to 'prompt'"),
        ("set.csv", b"prompt,completion\na,b,\n", "row 2: 3 cells, but the header has 2 columns; remove the delimiter"),
        ("set.csv", b'prompt,completion\na,"b\n', "row 2: a quote is never closed"),
        ("set.csv", b'prompt,completion\na,"b"c\n', "row 2: text follows a closing quote; .* written twice"),
        ("set.csv", b"question,answer\na,b\n", "rename `question` to `prompt`, `answer` to `completion`"),
        ("set.csv", b"input,output\na,b\n", "rename `input` to `prompt`, `output` to `completion`"),
        # JSON that is not one row per line
        ("set.jsonl", b'{"prompt": "a", "completion": "b"},\n', "line 1: a comma at the line's end: remove it"),
        (
            "set.jsonl",
            b'{"prompt": "a"} {"prompt": "b"}\n',
            "line 1: a second JSON value at column 17; write one row per",
        ),
        ("set.json", json.dumps({"prompt": "a", "completion": "b"}, indent=2).encode(), "line 1: pretty-printed JSON"),
        ("set.json", b'{"prompt": ["a", "b"], "completion": ["c", "d"]}', "a list for each column: write one row per"),
        ("set.json", json.dumps({"prompt": ["a"], "completion": ["b"]}, indent=1).encode(), "a list for each column"),
        (
            "set.json",
            b'{"data": [{"prompt": "a", "completion": "b"}]}',
            "write the list of `data` alone, as one JSON array",
        ),
        ("set.json", json.dumps({"rows": [{"prompt": "a"}]}, indent=1).encode(), "write the list of `rows` alone"),
        (
            "set.jsonl",
            b'{"prompt": "a", "completion": "b", "prompt": "c"}',
            "line 1: the key 'prompt' stands twice in one",
        ),
        ("set.json", b'[{"messages": [{"role": "user", "role": "user"}]}]', "row 1: the key 'role' stands twice"),
    ],
)
def test_another_file_is_refused_with_the_cause_and_the_cure(
    tmp_path: Path, filename: str, content: bytes, says: str
) -> None:
    (tmp_path / "set").write_bytes(content)
    error = refused(tmp_path / "set", filename, says)
    assert "weiß" not in error.message
    assert "\\x" not in error.message


SAID = {"from": "human", "value": "a"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Preference rows: .* the chosen text"),
        ({"chosen": TURNS, "rejected": TURNS}, "Preference rows"),
        ({"conversations": [SAID, SAID]}, "ShareGPT's form: rename `conversations` to `messages`, `from` to `role`"),
        ({"messages": [SAID, SAID]}, "field messages.0: ShareGPT's form"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "TRL's conversational form: join the lists"),
        ({"input": "a", "output": "b"}, "No instruction: rename `input` to `prompt`, `output` to `completion`"),
        ({"question": "a", "answer": "b"}, "rename `question` to `prompt`"),
        ({"prompt": "a", "response": "b"}, "Rename `response` to `completion`"),
        ({"instruction": "a", "response": "b"}, "Rename `response` to `output`"),
        ({"text": "a"}, "Plain text names no prompt and no answer"),
        ({"text": "a", "label": 1}, "Texts and labels"),
        ({"prompt": "a", "completion": "b", "id": 1, "source": "c"}, "fields 'id', 'source' are unknown: remove them"),
    ],
)
def test_rows_of_another_tool_are_named_with_what_to_do(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    (tmp_path / "set").write_text(json.dumps(row))
    assert refused(tmp_path / "set", "set.jsonl", says).message.startswith("line 1: field")
    (tmp_path / "set").write_text(json.dumps([row]))
    assert refused(tmp_path / "set", "set.json", says).message.startswith("row 1: field")


EMPTY: dict[str, Any] = {
    "tool_calls": None,
    "refusal": None,
    "annotations": [],
    "audio": {},
    "name": None,
    "weight": None,
}


def conversation(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns), "tools": None, "prompt": None, "id": None, "metadata": {}}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    text = pa.string()
    call = pa.struct([("name", text), ("arguments", text)])
    message = [
        ("role", text),
        ("content", text),
        ("name", text),
        ("weight", pa.float64()),
        ("tool_calls", pa.list_(call)),
    ]
    message += [("refusal", pa.null()), ("annotations", pa.list_(pa.int64()))]
    columns = [("messages", pa.list_(pa.struct(message))), ("tools", pa.null()), ("prompt", text), ("id", pa.int64())]
    parquet.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), path)


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_null_and_empty_fields_mean_not_given(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    write(
        tmp_path / "set",
        [conversation(*({**turn, **EMPTY} for turn in TURNS))],
    )
    (example,) = examples(tmp_path / "set", "")
    assert example.prompt == ChatPrompt((Turn("user", "a"), Turn("assistant", "b")), 1)
    assert example.target == "b"


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_an_assistant_without_content_is_context_when_its_weight_is_0(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    silent = {"role": "assistant", "content": None, "weight": 0}
    write(tmp_path / "set", [conversation(TURNS[0], silent, *TURNS)])
    (example,) = examples(tmp_path / "set", "")
    assert isinstance(example.prompt, ChatPrompt)
    assert (example.prompt.length, example.prompt.conversation[1].text) == (3, "")
    write(tmp_path / "set", [conversation(TURNS[0], {**silent, "weight": None}, *TURNS)])
    refused(tmp_path / "set", "", r"field messages.1.content: empty answer: there is nothing to learn; weight 0")


def test_an_instruction_with_a_null_input_has_none(tmp_path: Path) -> None:
    table = pa.table({"instruction": ["a"], "input": pa.nulls(1, pa.string()), "output": ["b"], "id": pa.nulls(1)})
    parquet.write_table(table, tmp_path / "set")
    write_lines(tmp_path / "lines", [{"instruction": "a", "input": None, "output": "b", "id": None}])
    assert pairs(tmp_path / "set", "") == pairs(tmp_path / "lines", "")


def test_a_filled_tool_call_is_refused_by_name(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    for write in (write_lines, write_parquet):
        write(tmp_path / "set", [conversation(TURNS[0], answer)])
        refused(tmp_path / "set", "", "field messages.1.tool_calls is unknown: remove it; .*tool calls and images")


def test_a_columns_unknown_values_are_refused_all_at_once(tmp_path: Path) -> None:
    parquet.write_table(
        pa.table({"prompt": ["a"], "completion": ["b"], "id": [1], "at": pa.nulls(1)}), tmp_path / "set"
    )
    refused(tmp_path / "set", "", "columns 'id', 'at' are unknown: remove them")


def test_a_name_in_a_message_is_cut_and_printable(tmp_path: Path) -> None:
    (tmp_path / "set").write_text(json.dumps({"prompt": "a", "completion": "b", "\x1b[2J" + "x" * 5000: 1}))
    assert len(refused(tmp_path / "set", "set.jsonl", r"field \\x1b\[2Jx").message) < 200
