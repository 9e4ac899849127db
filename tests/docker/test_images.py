"""What can be checked of the images without building them: what they copy, install and run exists here."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]
REFTSERVE = Path(sys.executable).parent / "reftserve"


def instructions(name: str, word: str) -> list[str]:
    return re.findall(rf"^{word} (.+)$", (ROOT / name).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_and_installed_exists(name: str) -> None:
    for line in instructions(name, "COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = next(line for line in instructions(name, "RUN") if "pip install" in line)
    assert "--constraint constraints.txt" in install, "as the Makefile does"
    extras = re.search(r"\.\[([\w,]+)\]", install)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_environment_is_of_settings_that_exist(name: str) -> None:
    from reftserve.server.settings import Settings

    for variable in re.findall(r"REFTSERVE_(\w+)=", (ROOT / name).read_text()):
        assert variable.lower() in Settings.model_fields


def test_compose_runs_commands_that_exist_on_one_volume() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert service["volumes"] == ["data:/data"]
        command, *flags = service["command"]
        shown = subprocess.run([str(REFTSERVE), command, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(flag in shown for flag in flags)
    assert set(compose["volumes"]) == {"data"}
    assert compose["services"]["worker"]["cpu_shares"] < 1024, "training takes what the server leaves"
