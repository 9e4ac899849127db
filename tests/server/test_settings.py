"""Settings: their sources and precedence, refused values, and their documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from reftserve.server.settings import GROUPS, OTHER_VARIABLES, Settings, SettingsError, unknown_variables
from reftserve.server.settings_reference import settings_reference

ROOT = Path(__file__).parents[2]


def test_flags_win_over_the_file_and_the_file_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 2\nmax_sequences = 2\n")
    for name in ("PORT", "MAX_SEQUENCES", "MAX_BATCH_TOKENS"):
        monkeypatch.setenv(f"REFTSERVE_{name}", "1")
    settings = Settings.from_flags(config=file, port=3)
    assert (settings.port, settings.max_sequences, settings.max_batch_tokens) == (3, 2, 1)


def test_a_misspelt_variable_is_refused_with_near_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFTSERVE_MAX_SEQUENCE", "8")
    with pytest.raises(
        SettingsError, match="REFTSERVE_MAX_SEQUENCE is not a setting; did you mean REFTSERVE_MAX_SEQUENCES"
    ):
        Settings.from_flags()


def test_a_misspelt_name_in_the_file_is_refused_with_near_names(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('quantisation = "int8"\n')
    with pytest.raises(SettingsError, match="quantisation is not a setting; did you mean quantization"):
        Settings.from_flags(config=file)


def test_a_variable_without_a_near_name_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFTSERVE_XYZZY", "1")
    with pytest.raises(SettingsError, match=r"REFTSERVE_XYZZY is not a setting$"):
        Settings.from_flags()


def test_case_does_not_matter_and_other_variables_are_left_alone() -> None:
    assert unknown_variables({"reftserve_port": "1", "Reftserve_Prt": "1", "PATH": "/bin"}) == ["Reftserve_Prt"]
    assert unknown_variables(dict.fromkeys(OTHER_VARIABLES, "x")) == []


def test_every_variable_that_the_packages_read_is_known() -> None:
    named = set()
    for folder in ("client", "server", "interventions", "docker", "tests/support"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix not in {".pyc", ".safetensors"}:
                named |= set(re.findall(r"\bREFTSERVE_[A-Z]+(?:_[A-Z]+)*\b", file.read_text(errors="ignore")))
    assert "REFTSERVE_URL" in named
    assert unknown_variables(dict.fromkeys(named, "")) == []


@pytest.mark.parametrize(
    ("written", "number"), [("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5GB", 1_500_000_000), (1 << 20, 1 << 20)]
)
def test_a_size_has_a_unit_or_is_bytes(written: str | int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(kv_cache_bytes=written).kv_cache_bytes == number  # type: ignore[arg-type]
    monkeypatch.setenv("REFTSERVE_KV_CACHE_BYTES", str(written))
    assert type(Settings.from_flags().kv_cache_bytes) is int
    assert Settings.from_flags().kv_cache_bytes == number


@pytest.mark.parametrize(
    ("written", "reason"), [("2 gigs", "is not a size"), ("0", "greater than 0"), ("-1MiB", "is not a size")]
)
def test_an_invalid_size_is_refused(written: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Settings(kv_cache_bytes=written)  # type: ignore[arg-type]


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), ("port = ", "not valid TOML")])
def test_a_settings_file_that_cannot_be_read_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=reason):
        Settings.from_flags(config=file)


def test_a_child_process_gets_the_resolved_settings_and_reads_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('kv_cache_bytes = "2GiB"\n')
    settings = Settings.from_flags(config=file)
    file.unlink()
    monkeypatch.setenv("REFTSERVE_PORT", "none")
    received = Settings.model_validate_json(settings.model_dump_json())
    assert received == settings
    assert received.kv_cache_bytes == 2 << 30


def test_every_setting_has_a_group_a_reason_and_a_default_in_words() -> None:
    reference = settings_reference()
    assert set(reference) == set(Settings.model_fields)
    assert sum(len(section.model_fields) for section in GROUPS.values()) == len(reference)
    for setting in reference.values():
        assert len(setting.meaning) > 15, setting.name
        assert setting.default != "None", f"{setting.name}: say with Unset what the server uses"
    assert reference["kv_cache_bytes"].default == "1 GiB"
    assert reference["keep_jobs_s"].default == "7 days"
    assert reference["quantization"].choices == ("none", "int8")


def test_the_settings_page_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_settings.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
