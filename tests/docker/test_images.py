"""The images, checked without a Docker daemon: lint them, build the wheel from the copied files, run the commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]
BIN = Path(sys.executable).parent
PACKAGES = ("server", "client", "interventions")


def instructions(name: str, word: str) -> list[str]:
    return re.findall(rf"^{word} (.+)$", (ROOT / name).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    # Mirrors drop pinned Debian versions with each point release; the base image pins the release.
    command = [str(BIN / "hadolint"), "--ignore", "DL3008", str(ROOT / name)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_copied_files_build_a_wheel_with_every_module_and_kernel(name: str, tmp_path: Path) -> None:
    context, wheels = tmp_path / "context", tmp_path / "wheels"
    context.mkdir()
    sources = [source for line in instructions(name, "COPY") for source in line.split()[:-1]]
    for source in sources:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, context / source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*build, str(context)], check=True, capture_output=True)
    (wheel,) = wheels.glob("reftserve-*.whl")
    inside = {member for member in zipfile.ZipFile(wheel).namelist() if member.startswith("reftserve/")}
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert inside == {f"reftserve/{file}" for file in tracked.split()}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_installed_packages_are_pinned_and_exist(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = next(line for line in instructions(name, "RUN") if "pip install" in line)
    assert "--constraint constraints.txt" in install, "as the Makefile does"
    extras = re.search(r"\.\[([\w,]+)\]", install)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_environment_variable_is_a_setting(name: str) -> None:
    from reftserve.server.settings import Settings

    for variable in re.findall(r"REFTSERVE_(\w+)=", (ROOT / name).read_text()):
        assert variable.lower() in Settings.model_fields


def test_compose_runs_commands_that_exist_on_one_volume() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert service["volumes"] == ["data:/data"]
        command, *flags = service["command"]
        shown = subprocess.run(
            [str(BIN / "reftserve"), command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert all(flag in shown for flag in flags)
    assert set(compose["volumes"]) == {"data"}
    assert compose["services"]["worker"]["cpu_shares"] < 1024, "training takes what the server leaves"
