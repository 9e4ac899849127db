"""Artifacts load as saved; damaged or foreign ones are refused; nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from reftserve.interventions import (
    BaseFingerprint,
    DtypeError,
    FingerprintMismatch,
    HashMismatch,
    InterventionConfig,
    InterventionError,
    LowRankEdit,
    ManifestError,
    NonFiniteError,
    PlacedEdit,
    Positions,
    PositionsError,
    Provenance,
    ShapeError,
    TrainableIntervention,
    compose,
    load_artifact,
    pack,
    parse_artifact,
    save_artifact,
    unpack,
)

BASE = BaseFingerprint(
    architecture="LlamaForCausalLM", hidden_size=8, num_layers=4, vocab_size=40, weights_hash="w", tokenizer_hash="t"
)


def make(folder: Path, positions: str = "f2+l2", *, tied: bool = False, layers: tuple[int, ...] = (0, 3)) -> Path:
    config = InterventionConfig("loreft", layers, positions, rank=2, tied=tied)
    save_artifact(
        folder,
        TrainableIntervention(config, 8).lower(),
        family="loreft",
        positions=positions,
        rank=2,
        base=BASE,
        tied=tied,
        provenance=Provenance(source="test", seconds=1.5),
    )
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make(tmp_path / "artifact")


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "prompt", "all"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_artifact_loads_unchanged(tmp_path: Path, positions: str, *, tied: bool) -> None:
    folder = make(tmp_path / "a", positions, tied=tied)
    found = load_artifact(folder)
    expected = TrainableIntervention(InterventionConfig("loreft", (0, 3), positions, 2, tied), 8).lower()
    assert [(p.layer, p.positions) for p in found.edits] == [(p.layer, p.positions) for p in expected]
    assert [p.edit.content_hash for p in found.edits] == [p.edit.content_hash for p in expected]
    assert found.manifest.provenance.seconds == 1.5
    again = unpack(pack(folder), tmp_path / "b")
    assert again.manifest == found.manifest
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["edits.safetensors", "manifest.json"]


def test_columns_hold_all_edits_and_the_edits_are_views_of_them(artifact: Path) -> None:
    found = load_artifact(artifact)
    assert found.columns.content_hash == compose([placed.edit for placed in found.edits]).content_hash
    for placed in found.edits:
        assert placed.edit.A.untyped_storage().data_ptr() == found.columns.A.untyped_storage().data_ptr()


def test_the_content_hash_of_a_published_artifact_never_changes(tmp_path: Path) -> None:
    """Registries and artifacts elsewhere store the hash, so new code must compute the old value."""
    edits = [
        PlacedEdit(
            layer,
            Positions.parse(positions),
            LowRankEdit(
                A=torch.arange(rank * 8.0).view(rank, 8) / 7,
                b=torch.arange(rank * 1.0) - layer,
                U=torch.arange(rank * 8.0).view(8, rank).T / 3,
                act=torch.arange(rank, dtype=torch.int8),
                scale=torch.full((rank,), 0.5),
            ),
        )
        for layer, positions, rank in [(0, "f2+l2", 2), (3, "l1", 3), (3, "all", 1)]
    ]
    save_artifact(tmp_path / "a", edits, family="loreft", positions="f2+l2", rank=2, base=BASE)
    assert (
        load_artifact(tmp_path / "a").content_hash == "3cd8b6a31eb5b05e87a77da5199542af36a41c857e3229e6451476389c731314"
    )


def changed(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> bytes:
    return save({**tensors, name: value})


def with_shape(tensors: dict[str, torch.Tensor], name: str, shape: list[int]) -> bytes:
    saved = save({**tensors, name: torch.zeros(0)})
    size = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + size])
    header[name]["shape"] = shape
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + saved[8 + size :]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: save({k: v for k, v in t.items() if k != "U"}), ManifestError, r"missing tensors \['U'\]"),
        (lambda t: changed(t, "0.A", torch.zeros(1)), ManifestError, r"unexpected ones \['0.A'\]"),
        (lambda t: changed(t, "A", torch.zeros(len(t["b"]), 9)), ShapeError, "U has shape"),
        (lambda t: changed(t, "A", torch.zeros(0, 8)), ShapeError, "A has shape"),
        (lambda t: save({k: v[:-1] for k, v in t.items()}), ShapeError, "holds 7 columns; the manifest declares 8"),
        (lambda t: changed(t, "b", t["b"].double()), DtypeError, "float64"),
        (lambda t: save({k: v.half() if k != "act" else v for k, v in t.items()}), DtypeError, "float16"),
        (lambda t: changed(t, "b", t["b"] * float("nan")), NonFiniteError, "b contains NaN"),
        (lambda t: changed(t, "b", t["b"] + 1e-6), HashMismatch, "content_hash is"),
        (lambda t: changed(t, "act", t["act"] + 6), DtypeError, "act holds"),
        (lambda t: changed(t, "b", t["b"].to(torch.float8_e8m0fnu)), ManifestError, "not a safetensors file"),
        (lambda t: with_shape(t, "A", [0, 1 << 40, 1 << 40]), ManifestError, "not a safetensors file"),
        (lambda t: with_shape(t, "A", [0, 1 << 64]), ManifestError, "not a safetensors file"),
        (lambda t: save(t)[:-4], ManifestError, "not a safetensors file"),
        (lambda _: b"", ManifestError, "not a safetensors file"),
        (lambda t: pickle.dumps(t), ManifestError, "not a safetensors file"),
    ],
)
def test_edits_that_contradict_the_manifest_are_refused(
    artifact: Path, change: Callable[[dict[str, torch.Tensor]], bytes], error: type[InterventionError], words: str
) -> None:
    tensors = load((artifact / "edits.safetensors").read_bytes())
    with pytest.raises(error, match=words):
        parse_artifact((artifact / "manifest.json").read_bytes(), change(tensors))


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("schema_version",), 1, ManifestError),
        (("rank",), "many", ManifestError),
        (("surprise",), 1, ManifestError),
        (("edits", 0, "rank"), 3, ShapeError),
        (("edits", 0, "layer"), 4, ShapeError),
        (("edits", 0, "positions"), "f2-l2", PositionsError),
        (("edits", 0, "layer"), 1, HashMismatch),
        (("edits", 0, "positions"), "l1", HashMismatch),
        (("base", "hidden_size"), 16, ShapeError),
        (("content_hash",), "0" * 64, HashMismatch),
    ],
)
def test_an_invalid_manifest_is_refused(
    artifact: Path, path: tuple[str | int, ...], value: object, error: type[InterventionError]
) -> None:
    manifest = json.loads((artifact / "manifest.json").read_bytes())
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(error):
        parse_artifact(json.dumps(manifest).encode(), (artifact / "edits.safetensors").read_bytes())


@given(data=st.data())
def test_every_damaged_byte_is_detected(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        make(folder)
    manifest, edits = (folder / "manifest.json").read_bytes(), (folder / "edits.safetensors").read_bytes()
    header = 8 + int.from_bytes(edits[:8], "little")
    at = data.draw(st.integers(header, len(edits) - 1))
    damaged = bytes([*edits[:at], edits[at] ^ data.draw(st.integers(1, 255)), *edits[at + 1 :]])
    with pytest.raises(InterventionError):
        parse_artifact(manifest, damaged)


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def damaged(archive: bytes) -> bytes:
    at = 30 + len("manifest.json")
    return archive[:at] + b"\xff" * 20 + archive[at + 20 :]


def test_an_archive_with_other_files_is_refused_and_nothing_is_written(artifact: Path, tmp_path: Path) -> None:
    good = {name: (artifact / name).read_bytes() for name in ("manifest.json", "edits.safetensors")}
    target = tmp_path / "new" / "artifact"
    for data, words in [
        (b"not a zip", "zip"),
        (pack(artifact)[:-30], "zip"),
        (damaged(zipped(**good)), "zip"),
        (zipped(**good, extra=b"x"), "extra"),
        (zipped(**{"../manifest.json": b"", "edits.safetensors": b""}), r"\.\./manifest"),
        (zipped(**{"manifest.json": good["manifest.json"]}), "expected manifest.json"),
        (zipped(**{**good, "edits.safetensors": bytes(10**7)}), "edits.safetensors unpacks to more than"),
    ]:
        with pytest.raises(ManifestError, match=words):
            unpack(data, target, max_bytes=10**6)
        assert not target.parent.exists() or not list(target.parent.iterdir())


def test_an_artifact_appears_whole_or_not_at_all(artifact: Path) -> None:
    with pytest.raises(OSError):
        make(artifact)
    assert load_artifact(artifact)
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"], "no scratch folder is left"


def test_another_base_is_refused_by_name_and_only_hashes_can_be_overridden() -> None:
    BASE.require(BASE)
    for field, value in [("weights_hash", "x"), ("tokenizer_hash", None), ("chat_template_hash", "new")]:
        other = BASE.model_copy(update={field: value})
        with pytest.raises(FingerprintMismatch, match=f"{field} is {value!r}, the base has"):
            BASE.require(other)
        BASE.require(other, override=True)
    for field, value in [("hidden_size", 9), ("num_layers", 5), ("vocab_size", 41), ("architecture", "OPTForCausalLM")]:
        with pytest.raises(FingerprintMismatch, match=field):
            BASE.require(BASE.model_copy(update={field: value}), override=True)
