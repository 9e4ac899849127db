"""Settings: their sources and precedence, refused values, and their documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from reftserve.server.settings import GROUPS, Settings
from reftserve.server.settings_reference import settings_reference
from reftserve.server.settings_sources import OTHER_VARIABLES, SettingsError, service_links, unknown_variables

ROOT = Path(__file__).parents[2]


def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 1\nmax_sequences = 1\nmax_batch_tokens = 1\n")
    for name in ("PORT", "MAX_SEQUENCES"):
        monkeypatch.setenv(f"REFTSERVE_{name}", "2")
    settings = Settings.from_flags(config=file, port=3)
    assert (settings.port, settings.max_sequences, settings.max_batch_tokens) == (3, 2, 1)


def test_an_empty_variable_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 1\n")
    monkeypatch.setenv("REFTSERVE_PORT", "")
    monkeypatch.setenv("REFTSERVE_BLOB_URL", "")
    settings = Settings.from_flags(config=file)
    assert (settings.port, settings.blob_url) == (1, None)


# What kubelet sets in each pod of a namespace with services called `reftserve` and `reftserve-data`.
KUBERNETES = {
    "REFTSERVE_SERVICE_HOST": "10.0.0.1",
    "REFTSERVE_SERVICE_PORT": "80",
    "REFTSERVE_SERVICE_PORT_HTTP": "80",
    "REFTSERVE_PORT": "tcp://10.0.0.1:80",
    "REFTSERVE_PORT_80_TCP": "tcp://10.0.0.1:80",
    "REFTSERVE_PORT_80_TCP_PROTO": "tcp",
    "REFTSERVE_PORT_80_TCP_PORT": "80",
    "REFTSERVE_PORT_80_TCP_ADDR": "10.0.0.1",
    "REFTSERVE_DATA_SERVICE_HOST": "fd00::1",
    "REFTSERVE_DATA_SERVICE_PORT": "53",
    "REFTSERVE_DATA_PORT": "udp://[fd00::1]:53",
    "REFTSERVE_DATA_PORT_53_UDP_ADDR": "fd00::1",
}


def test_variables_that_kubernetes_sets_for_services_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert Settings.from_flags().port == Settings.model_fields["port"].default
    assert Settings.from_flags(port="81").port == 81
    assert service_links(KUBERNETES) == sorted(KUBERNETES)


def test_every_setting_with_a_name_that_kubernetes_sets_may_have_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [name for name in Settings.model_fields if name.endswith("port")]
    assert "port" in shared
    for name in shared:
        monkeypatch.setenv(f"REFTSERVE_{name.upper()}", "tcp://10.0.0.1:80")
        assert getattr(Settings.from_flags(), name) == Settings.model_fields[name].default


@pytest.mark.parametrize("value", ["8001", "tcp", "http://10.0.0.1:80", "10.0.0.1"])
def test_a_port_in_another_form_is_a_setting(value: str) -> None:
    assert service_links({"REFTSERVE_PORT": value, "REFTSERVE_HOST": "10.0.0.1"}) == []


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.toml").write_text('model = "~/model"\ndatabase_url = "sqlite:///~/a.db"\n')
    monkeypatch.setenv("REFTSERVE_CONFIG", "~/settings.toml")
    settings = Settings.from_flags(data="~/data")
    assert settings.data == tmp_path / "data"
    assert settings.model == str(tmp_path / "model")
    assert settings.database_url == f"sqlite:///{tmp_path}/a.db"
    assert Settings.from_flags(model="org/model~1").model == "org/model~1"


def test_a_tilde_without_a_home_folder_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(SettingsError, match="--data is '~/data': no home folder is known for ~/data; set HOME"):
        Settings.from_flags(data="~/data")


def test_a_refused_value_names_the_flag_the_variable_or_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('max_sequences = "some"\n')
    monkeypatch.setenv("REFTSERVE_PORT", "http")
    with pytest.raises(SettingsError) as found:
        Settings.from_flags(config=file, kv_cache_bytes="two")
    for place in (
        "--kv-cache-bytes is 'two'",
        "REFTSERVE_PORT is 'http'",
        "max_sequences in the settings file is 'some'",
    ):
        assert place in str(found.value)


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
    given = {"reftserve_port": "1", "Reftserve_Prt": "1", "PATH": "/bin"}
    assert unknown_variables(given, Settings.model_fields) == ["Reftserve_Prt"]
    assert unknown_variables(dict.fromkeys(OTHER_VARIABLES, "x"), Settings.model_fields) == []


def test_every_variable_that_the_packages_read_is_known() -> None:
    named = set()
    for folder in ("client", "server", "interventions", "docker", "tests/support"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix not in {".pyc", ".safetensors"}:
                named |= set(re.findall(r"\bREFTSERVE_[A-Z]+(?:_[A-Z]+)*\b", file.read_text(errors="ignore")))
    assert "REFTSERVE_URL" in named
    assert unknown_variables(dict.fromkeys(named, ""), Settings.model_fields) == []


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


def test_a_settings_file_that_does_not_exist_is_refused_with_near_names(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("")
    with pytest.raises(SettingsError, match=r"setings\.toml: No such file.*did you mean .*/settings\.toml\?"):
        Settings.from_flags(config=tmp_path / "setings.toml")


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
