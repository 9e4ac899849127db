"""The commands of the server extra: `--help`, flags, and one-line errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from reftserve.server.settings import Settings
from reftserve.server.settings_reference import settings_reference, takes_settings

REFTSERVE = Path(sys.executable).parent / "reftserve"


def run(*arguments: str, code: int = 0, **variables: str) -> str:
    command = [sys.executable, "-m", "reftserve.server.commands", *arguments]
    environment = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1", **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("serve", ["model", "data", "host", "port", "config", "device", "dtype", "quantization", "served_model_name"]),
        ("serve", ["engine_threads", "kv_cache_bytes", "max_sequences", "worker", "worker_threads"]),
        ("worker", ["model", "data", "config", "device", "worker_threads", "activation_cache_bytes"]),
        ("doctor", ["model", "data", "config", "device", "host", "port"]),
    ],
)
def test_help_shows_each_flag_with_its_meaning_and_its_default(command: str, names: list[str]) -> None:
    shown = run(command, "--help")
    for name in names:
        setting = settings_reference()[name]
        flag = setting.flag.split("/")[0]
        line = next(line for line in shown.splitlines() if re.search(rf"{flag}\s", line))
        assert setting.meaning in line
        assert f"Default: {setting.default}" in line


def test_flags_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFTSERVE_RESERVE_BYTES")  # set for all tests
    app = typer.Typer()
    received: list[Settings] = []
    app.command()(takes_settings(*settings_reference())(received.append))
    flags = ["--quantization", "int8", "--kv-cache-bytes", "2GiB", "--no-worker", "--lease-s", "2.5", "--data", "d"]
    result = CliRunner().invoke(app, [*flags, "--served-model-name", "x", "--override-fingerprint"])
    assert result.exit_code == 0, result.output
    expected = {"quantization": "int8", "kv_cache_bytes": 2 << 30, "worker": False, "lease_s": 2.5, "data": Path("d")}
    expected |= {"served_model_name": "x", "override_fingerprint": True}
    assert received[0].model_dump(exclude_defaults=True) == expected


@pytest.mark.parametrize(
    ("command", "variables", "reason"),
    [
        ("serve --quantization int4", {}, "--quantization is 'int4': Input should be 'none' or 'int8'"),
        ("serve --kv-cache-bytes two", {}, "--kv-cache-bytes is 'two': this is not a size"),
        ("serve --port 99999", {}, "--port is '99999': Input should be less than or equal to 65535"),
        ("worker --worker-threads none", {}, "--worker-threads is 'none': Input should be a valid integer"),
        ("doctor --config none.toml", {}, "settings file none.toml: No such file"),
        ("serve", {"REFTSERVE_PROT": "1"}, "REFTSERVE_PROT is not a setting; did you mean REFTSERVE_PORT"),
        ("worker", {"REFTSERVE_PROT": "1"}, "REFTSERVE_PROT is not a setting; did you mean REFTSERVE_PORT"),
        ("doctor", {"REFTSERVE_PROT": "1"}, "REFTSERVE_PROT is not a setting; did you mean REFTSERVE_PORT"),
    ],
)
def test_an_invalid_setting_gives_a_one_line_error(command: str, variables: dict[str, str], reason: str) -> None:
    said = run(*command.split(), code=1, **variables)
    assert said.startswith(f"error: settings: {reason}")
    assert len(said.splitlines()) == 1


def test_doctor_names_every_problem(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reftserve.server.commands", "doctor", "--model", str(tmp_path), "--port", "0"]
    environment = {**os.environ, "COLUMNS": "400"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1
    assert f"wrong base model: {tmp_path} " in result.stdout


@pytest.mark.parametrize("damage", ["no weights", "no config", "config without sizes", "config that is no JSON"])
def test_an_incomplete_model_folder_gives_a_one_line_error(
    damage: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    if damage == "no weights":
        (model / "model.safetensors").unlink()
    else:
        config = {"no config": None, "config without sizes": "{}", "config that is no JSON": "{"}[damage]
        (model / "config.json").unlink()
        if config is not None:
            (model / "config.json").write_text(config)
    said = run("serve", "--model", str(model), "--data", str(tmp_path / "data"), "--port", "0", code=1)
    assert "error:" in said.splitlines()[-1]
    assert str(model) in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_doctor_accepts_the_same_addresses_as_serve(host: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_llama_folder), "--data", str(tmp_path), "--port", "0", "--host", host]
    assert f"port: {host}:0 is free" in run("doctor", *flags)


def test_the_version_is_the_distributions() -> None:
    result = subprocess.run([str(REFTSERVE), "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == version("reftserve")
