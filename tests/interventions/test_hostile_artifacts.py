"""Hostile archives: whatever their bytes are, they are refused as an InterventionError, soon and in little memory."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reftserve.interventions import (
    BaseFingerprint,
    InterventionError,
    LowRankEdit,
    ManifestError,
    PlacedEdit,
    Positions,
    load_artifact,
    load_history,
    save_artifact,
    unpack,
)
from reftserve.interventions.history import History
from reftserve.interventions.positions import Positions as Notation

BASE = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=8, num_layers=4, vocab_size=40, weights_hash="w")
MUTATIONS = 500
LONGEST_MESSAGE = 1000
Document = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of an artifact."""
    draw = torch.Generator().manual_seed(0)
    numbers = [torch.randn(2, 8, generator=draw) for _ in range(2)]
    edit = LowRankEdit(numbers[0], torch.ones(2), numbers[1], torch.zeros(2, dtype=torch.int8), torch.ones(2))
    folder = tmp_path_factory.mktemp("good") / "artifact"
    edits = [PlacedEdit(layer, Positions.parse("f2+l2"), edit) for layer in (0, 3)]
    history = History.of_steps([{"step": step, "train_loss": 1.5, "valid_loss": 1.0} for step in range(20)])
    save_artifact(folder, edits, family="loreft", positions="f2+l2", rank=2, base=BASE, history=history)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


HOSTILE: list[str] = [
    *("null", "true", "-1", "0", "1e999", "NaN", "-Infinity", "9" * 5000, str(2**63), str(2**31), '"x"', "[]", "{}"),
    *(
        '"\\ud800"',
        '"\\u0000"',
        '"' + "x" * 300_000 + '"',
        "[" * 5000,
        "[" * 5000 + "]" * 5000,
        '{"a":1,"a":2}',
        "1e-400",
    ),
    *('"l1"', '"f9999999"', '"٣"', "[1,2]", '{"rank":1}', "2.5", '"0"', "{", '"', "\\", "// x", "1_0"),
]


def with_hostile_value(draw: random.Random, files: dict[str, bytes]) -> bytes:
    """Replace one value, anywhere in the manifest, the history or the header of the edits."""
    name = draw.choice(sorted(files))
    content = files[name]
    head = content[8 : 8 + int.from_bytes(content[:8], "little")] if name.endswith("tensors") else content
    document: Document = json.loads(head)
    place: Any = document
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    place[key] = "@hostile@"
    text = json.dumps(document).replace('"@hostile@"', draw.choice(HOSTILE), 1).encode("utf-8", "surrogatepass")
    if name.endswith("tensors"):
        text = len(text).to_bytes(8, "little") + text + content[8 + len(head) :]
    return zipped({**files, name: text}, draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def with_flipped_bytes(draw: random.Random, files: dict[str, bytes]) -> bytes:
    data = bytearray(zipped(files, draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    return bytes(data)


def cut(draw: random.Random, files: dict[str, bytes]) -> bytes:
    data = zipped(files)
    start = draw.choice([0, 0, draw.randrange(len(data))])
    return data[start : draw.randrange(len(data))]


def with_changed_file(draw: random.Random, files: dict[str, bytes]) -> bytes:
    """Flip, cut or lengthen a file before it is packed, so that the zip's checksums agree."""
    name = draw.choice(sorted(files))
    content = bytearray(files[name])
    at = draw.randrange(len(content))
    change = draw.randrange(3)
    if change == 0:
        content[at] ^= draw.randrange(1, 256)
    elif change == 1:
        del content[at : at + draw.randrange(1, 40)]
    else:
        content[at:at] = draw.randbytes(draw.randrange(1, 40))
    return zipped({**files, name: bytes(content)})


KINDS: list[Callable[[random.Random, dict[str, bytes]], bytes]] = [
    with_hostile_value,
    with_flipped_bytes,
    with_changed_file,
    cut,
]


def refusal(data: bytes, folder: Path) -> str | None:
    """Unpack an archive; return why it is refused, or None."""
    try:
        unpack(data, folder, max_bytes=10**6)
    except InterventionError as error:
        return str(error)
    return None


def test_mutated_archives_are_refused_or_hold_what_the_good_one_holds(good: dict[str, bytes], tmp_path: Path) -> None:
    content_hash = json.loads(good["manifest.json"])["content_hash"]
    refused = 0
    for seed in range(MUTATIONS):
        draw = random.Random(seed)  # noqa: S311 - test data
        data = KINDS[seed % len(KINDS)](draw, good)
        message = refusal(data, tmp_path / str(seed))
        if message is not None:
            refused += 1
            assert len(message) <= LONGEST_MESSAGE
            assert not (tmp_path / str(seed)).exists()
        else:
            assert load_artifact(tmp_path / str(seed)).content_hash == content_hash
            load_history(tmp_path / str(seed))
    assert refused > MUTATIONS / 2


@pytest.mark.parametrize("file", ["manifest.json", "history.json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 1' + "0" * 30 + "}", "too large"),
        ('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        ('{"a": "\\u0000"}', "NUL"),
        ('{"a": "\\ud800"}', "document|a|surrogate"),
        ("[1]", "one object"),
        ('{"' + "k" * 100_000 + '": 1, "' + "k" * 100_000 + '": 1}', "the key 'k{50}"),
        ('{"edits": [' + "{}," * 200_000 + "{}]}", "values; at most"),
    ],
    ids=[
        "twice",
        "nan",
        "infinity",
        "overflow",
        "digits",
        "deep",
        "nul",
        "surrogate",
        "list",
        "long key",
        "many values",
    ],
)
def test_json_that_readers_understand_differently_is_refused(
    good: dict[str, bytes], tmp_path: Path, file: str, text: str, words: str
) -> None:
    with pytest.raises(ManifestError, match=words) as refusal:
        unpack(zipped({**good, file: text.encode()}), tmp_path / "a")
    assert len(str(refusal.value)) <= LONGEST_MESSAGE


def test_files_have_bounds_of_their_own_and_together(good: dict[str, bytes], tmp_path: Path) -> None:
    large = {"manifest.json": 1 << 20, "history.json": 8 << 20}
    for name, limit in large.items():
        padded = {**good, name: good[name] + b" " * limit}
        with pytest.raises(ManifestError, match=f"{name} unpacks to more than {limit} bytes"):
            unpack(zipped(padded, zipfile.ZIP_STORED), tmp_path / "a")
    total = sum(map(len, good.values()))
    assert unpack(zipped(good), tmp_path / "fits", max_bytes=total)
    with pytest.raises(ManifestError, match="unpacks to more than"):
        unpack(zipped(good), tmp_path / "a", max_bytes=total - 1)
    with pytest.raises(ManifestError, match="about 20000 files"):
        unpack(zipped({str(number): b"" for number in range(20_000)}), tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parameters", 10**17),
        ("parameters", 2**31),
        ("parameters", 10**6),
        ("family", "x" * 257),
        ("positions", "x" * 257),
        ("layers", [0] * 4097),
        ("edits", [{"layer": 0, "positions": "l1", "rank": 1}] * 4097),
        ("content_hash", "x" * 64),
    ],
)
def test_fields_of_a_manifest_are_bounded(good: dict[str, bytes], tmp_path: Path, field: str, value: object) -> None:
    manifest = json.loads(good["manifest.json"]) | {field: value}
    with pytest.raises(ManifestError, match=field):
        unpack(zipped({**good, "manifest.json": json.dumps(manifest).encode()}), tmp_path / "a")


def test_a_refusal_quotes_little_of_what_was_sent() -> None:
    with pytest.raises(InterventionError) as refusal:
        Notation.parse("f" * 200_000)
    assert len(str(refusal.value)) < 400


BOMBS = {
    "manifest": ("manifest.json", b'{"edits":[' + b"{}," * 16_000_000 + b"{}]}"),
    "history": ("history.json", b'{"step":[' + b"1," * 4_000_000 + b"1]}"),
    "nested history": ("history.json", b'{"step":[' + b"[]," * 2_700_000 + b"1]}"),
    "edits": ("edits.safetensors", bytes(50_000_000)),
}
MEASURE = """
import re, sys
from pathlib import Path
from reftserve.interventions import InterventionError, unpack
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
data = Path(sys.argv[1]).read_bytes()
before = peak()
try:
    unpack(data, Path(sys.argv[1]).with_suffix(".folder"))
except InterventionError:
    print(peak() - before)
"""


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_is_refused_within_50_mb(good: dict[str, bytes], tmp_path: Path, name: str) -> None:
    file, content = BOMBS[name]
    bomb = tmp_path / "bomb.zip"
    bomb.write_bytes(zipped({**good, file: content}))
    assert bomb.stat().st_size < 100_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(bomb)], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(run.stdout) <= 50 << 10
