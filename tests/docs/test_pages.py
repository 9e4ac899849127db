"""Everything that the pages name exists: files, commands, flags, settings, variables, endpoints, fields and codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from reftserve.client.schemas import ChatCompletionRequest, ClassifyRequest, CompletionRequest
from reftserve.server.settings import Settings
from reftserve.server.settings_sources import OTHER_VARIABLES

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "examples/README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
READERS_OWN = {"reviews.jsonl"}
SOURCES = ("server", "client", "interventions", "benchmarks", "examples", "tests", "docs", "docker")
WIDE = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1"}
REFTSERVE = Path(sys.executable).parent / "reftserve"
# First words of several settings: a name that begins with one is a setting or a field of the API.
SETTING_PREFIXES = {name.split("_")[0] for name in Settings.model_fields if "_" in name}


def quoted(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@cache
def files() -> list[str]:
    found = [path for folder in SOURCES for path in (ROOT / folder).rglob("*")]
    return [str(path.relative_to(ROOT)) for path in [*found, *ROOT.glob("*")] if "__pycache__" not in path.parts]


@cache
def source(*folders: str) -> str:
    return "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def help_of(*command: str) -> str:
    result = subprocess.run([str(REFTSERVE), *command, "--help"], capture_output=True, text=True, timeout=60, env=WIDE)
    assert result.returncode == 0, f"reftserve {' '.join(command)}: {result.stderr}"
    return result.stdout


def commands(page: str) -> list[list[str]]:
    lines = (line.removeprefix("$ ").split("#")[0].strip() for line in quoted(page))
    return [line.split()[1:] for line in lines if line.startswith("reftserve ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    for text in quoted(page):
        for name in re.findall(r"(?<![\w./:@<])[\w./-]+\.(?:py|cpp|h|md|sh|toml|yaml|jsonl)\b(?!\()", text):
            if name in READERS_OWN:
                continue
            found = [path for path in files() if path == name or path.endswith(f"/{name}")]
            assert found, f"{page}: `{name}` is no file of the repository"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_has_a_command_and_flags_that_exist(page: str) -> None:
    for words in commands(page):
        shown = help_of(*words[: 2 if words[0] in {"files", "jobs", "interventions"} else 1])
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert flag in shown, f"{page}: reftserve {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_belongs_to_a_command_or_a_script(page: str) -> None:
    known = "".join(help_of(command) for command in ("serve", "worker", "doctor", "chat", "train"))
    known += help_of() + source("benchmarks", "docs")
    for text in quoted(page):
        for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", text):
            assert re.search(rf"{flag}(?![\w-])", known), f"{page}: {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in quoted(page):
        for target in re.findall(r"^(?:\$ )?make ([a-z-]+)", text):
            assert target in targets, f"{page}: make {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_and_variable_exists(page: str) -> None:
    fields = set(re.findall(r"^    (\w+): ", source("client/schemas", "server/storage"), re.MULTILINE))
    for text in quoted(page):
        for variable in re.findall(r"\bREFTSERVE_[A-Z_]*[A-Z]\b", text):
            known = variable in OTHER_VARIABLES or variable.removeprefix("REFTSERVE_").lower() in Settings.model_fields
            assert known or variable == "REFTSERVE_SERVICE_HOST", f"{page}: {variable}"
        name = re.match(r"([a-z]+(?:_[a-z]+)+)(?:: \w+| = .*)?$", text)
        if name and name[1].split("_")[0] in SETTING_PREFIXES:
            is_code = re.search(rf'code ?= ?"{name[1]}"', source("server")) is not None
            known_name = (
                is_code or name[1] in {*Settings.model_fields, *fields} or re.search(rf"\b{name[1]}\b", kernels())
            )
            assert known_name, f"{page}: {name[1]}"


@cache
def kernels() -> str:
    return "\n".join(
        path.read_text() for path in (ROOT / "server" / "base" / "cpu_kernels").iterdir() if path.is_file()
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_method_of_a_class_exists(page: str) -> None:
    code = source("server", "client", "interventions")
    for text in quoted(page):
        if method := re.fullmatch(r"([A-Z][A-Za-z]+)\.(\w+)(?:\(\))?", text):
            assert f"class {method[1]}" in code, f"{page}: {text}"
            assert f"def {method[2]}(" in code, f"{page}: {text}"


def test_every_endpoint_of_the_reference_is_a_route_and_every_route_is_there() -> None:
    from reftserve.server.app import ROUTERS

    def normal(path: str) -> str:
        return re.sub(r"\{[^}]*\}", "{}", path.split("?")[0])

    routes = {(method, normal(r.path)) for part in ROUTERS for r in part.router.routes for method in r.methods}
    text = (ROOT / "docs" / "http.md").read_text()
    endpoints = re.findall(r"`(GET|POST|PUT|DELETE) ((?:\{[^}]*\}|[^`{ ])+)", text)
    named = {(method, normal(path)) for method, path in endpoints}

    def meets(route: str, path: str) -> bool:
        return route.endswith(path.removeprefix("...")) if path.startswith("...") else route == path

    for method, path in named - {("GET", "/docs"), ("GET", "/openapi.json")}:
        assert any(meets(route, path) for m, route in routes if m == method), f"{method} {path} is no route"
    for method, route in routes:
        assert any(meets(route, path) for m, path in named if m == method), f"{method} {route} is not in http.md"


def test_every_field_of_a_generation_request_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    unnamed = {"best_of", "suffix"}  # accepted only with OpenAI's default value
    for name in {**ChatCompletionRequest.model_fields, **CompletionRequest.model_fields}:
        assert name in unnamed or f"`{name}`" in text or f"`{name}." in text, name


def test_the_classification_of_the_reference_is_a_request() -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    body = next(line for line in text.splitlines() if '"labels": [' in line and line.startswith("    {"))
    assert ClassifyRequest.model_validate(json.loads(body)).labels == ["good", "bad"]


def test_every_error_code_on_a_page_is_one_that_the_server_gives() -> None:
    codes = set(re.findall(r'code="(\w+)"', source("server"))) | set(re.findall(r'code = "(\w+)"', source("server")))
    table = (ROOT / "docs" / "http.md").read_text().split("## Status codes")[1]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table)) - set(Settings.model_fields)
    quoted_in_source = {code for code in named if f'"{code}"' in source("server")}
    assert named <= codes | quoted_in_source
    assert len(named) > 10
