"""`reftserve doctor --store`, `--rebuild` and `--deep` say what is wrong, mend it, and end with the right code."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from published import OWNER, make_artifact
from typer.testing import CliRunner, Result

from reftserve.interventions import fingerprint
from reftserve.server.base.folder import open_base
from reftserve.server.commands import app
from reftserve.server.registry.names import Reference
from reftserve.server.registry.store import open_store
from reftserve.server.settings import Settings

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


@pytest.fixture
def settings(tiny_llama_folder: Path, tmp_path: Path) -> Settings:
    model = tmp_path / "tiny-llama"
    shutil.copytree(tiny_llama_folder, model)
    return Settings(model=str(model), data=tmp_path / "data")


def doctor(settings: Settings, *flags: str) -> Result:
    command = ["doctor", "--model", settings.model, "--data", str(settings.data), *flags]
    return CliRunner().invoke(app, command, terminal_width=1000)


def change_in_place(file: Path) -> None:
    """Flip a bit of a file's last byte; keep its size and its time of modification."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_lost_database_is_found_rebuilt_and_then_without_fault(settings: Settings, tmp_path: Path) -> None:
    store = open_store(settings, open_base(settings).fingerprint)
    folder = make_artifact(tmp_path / "artifact", base=fingerprint(Path(settings.model)))
    store.interventions.publish(OWNER, "tone", folder)
    assert doctor(settings, "--store").exit_code == 0
    store.database.close()
    for file in settings.data.glob("reftserve.db*"):
        file.unlink()
    found = doctor(settings, "--store")
    assert found.exit_code == 1
    assert "wrong foreign:" in found.output
    assert "wrong orphan: interventions/" in found.output
    rebuilt = doctor(settings, "--store", "--rebuild")
    assert rebuilt.exit_code == 0, rebuilt.output
    assert "registered tone@1 from interventions/" in rebuilt.output
    assert doctor(settings, "--store").exit_code == 0
    store = open_store(settings, open_base(settings).fingerprint)
    assert store.interventions.resolve(OWNER, Reference("tone")).id == "tone@1"
    upload = store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
    (settings.data / "blobs" / upload.blob_key).unlink()
    found = doctor(settings, "--store")
    assert (found.exit_code, f"missing: the bytes of file '{upload.id}'" in found.output) == (1, True)


def test_weights_that_change_in_place_are_hashed_again(settings: Settings) -> None:
    before = open_base(settings).fingerprint
    assert open_base(settings).fingerprint == before
    change_in_place(Path(settings.model) / "model.safetensors")
    assert open_base(settings).fingerprint.weights_hash != before.weights_hash


def test_deep_finds_weights_that_differ_from_the_recorded_fingerprint(settings: Settings) -> None:
    assert doctor(settings, "--deep").exit_code == 0
    open_base(settings)
    known = doctor(settings, "--deep")
    assert (known.exit_code, "all hashes are the recorded ones" in known.output) == (0, True)
    change_in_place(Path(settings.model) / "model.safetensors")
    found = doctor(settings, "--deep")
    assert (found.exit_code, "weights_hash is" in found.output) == (1, True)
