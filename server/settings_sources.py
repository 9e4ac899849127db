"""The sources of settings besides flags: environment variables and a TOML file. Which names and values they may hold.

`settings.py` reads them; this module knows no field.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic_core import ErrorDetails
from rapidfuzz import process

ENV_PREFIX = "REFTSERVE_"
# Variables with our prefix that are not settings: two are the client's, one is the tests'.
OTHER_VARIABLES = frozenset({"REFTSERVE_URL", "REFTSERVE_API_KEY", "REFTSERVE_TEST_MODEL"})
# Names and values of the variables that Kubernetes sets in a pod for a service called `reftserve` or `reftserve-...`:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = ENV_PREFIX + r"(\w+_)?"
_SERVICE_LINKS = [
    (re.compile(_SERVICE + name, re.ASCII), re.compile(value, re.IGNORECASE))
    for name, value in {
        "SERVICE_HOST": r"[0-9a-f.:]+",
        r"SERVICE_PORT(_\w+)?": r"\d+",
        r"PORT(_\d+_(TCP|UDP|SCTP))?": r"(tcp|udp|sctp)://\S+",
        r"PORT_\d+_(TCP|UDP|SCTP)_PROTO": r"tcp|udp|sctp",
        r"PORT_\d+_(TCP|UDP|SCTP)_PORT": r"\d+",
        r"PORT_\d+_(TCP|UDP|SCTP)_ADDR": r"[0-9a-f.:]+",
    }.items()
]


class SettingsError(ValueError):
    """A setting is unknown or has a value that is refused, or a settings file cannot be read."""


def service_links(environment: Mapping[str, str]) -> list[str]:
    """Return the variables with our prefix that Kubernetes has set for a service; they are no settings."""
    return sorted(
        variable
        for variable, value in environment.items()
        if any(name.fullmatch(variable) and form.fullmatch(value) for name, form in _SERVICE_LINKS)
    )


def unknown_variables(environment: Mapping[str, str], fields: Collection[str]) -> list[str]:
    """Return the variables with our prefix that name no setting. Like pydantic-settings, this ignores case."""
    known = {ENV_PREFIX + name.upper() for name in fields} | OTHER_VARIABLES
    ours = {name for name in environment if name.upper().startswith(ENV_PREFIX)}
    return sorted(name for name in ours.difference(service_links(environment)) if name.upper() not in known)


def refuse_unknown(names: Collection[str], fields: Collection[str], *, prefix: str = "") -> None:
    """Raise SettingsError, with near names, if there are any `names`. prefix: of these names, none in a file."""
    sentences = []
    for name in names:
        near = process.extract(name[len(prefix) :].lower(), sorted(fields), limit=2, score_cutoff=75)
        known = [prefix + (field.upper() if prefix else field) for field, _, _ in near]
        sentences.append(f"{name} is not a setting" + (f"; did you mean {' or '.join(known)}?" if known else ""))
    if sentences:
        raise SettingsError(". ".join(sentences))


def refusal(error: ErrorDetails, flags: Collection[str]) -> str:
    """Say which flag, variable or line of the file holds a refused value. flags: the names of the given ones."""
    name = str(error["loc"][0])
    variable = ENV_PREFIX + name.upper()
    if name in flags:
        place = f"--{name.replace('_', '-')}"
    elif variable in {known.upper() for known, value in os.environ.items() if value}:
        place = variable
    else:
        place = f"{name} in the settings file"
    return f"{place} is {error['input']!r}: {error['msg'].removeprefix('Value error, ')}"


def expand_home(path: Path) -> Path:
    """Return the path with the home folder in place of `~`. Raises ValueError when that folder is unknown."""
    try:
        return path.expanduser()
    except RuntimeError as cause:
        raise ValueError(f"no home folder is known for {path}; set HOME, or write the whole path") from cause


def readable_toml(named: Path) -> Path:
    """Return the file, or raise SettingsError unless it is readable TOML; pydantic-settings ignores a missing file."""
    try:
        file = expand_home(named)
        tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        near = _near_files(file)
        hint = f"; did you mean {' or '.join(map(str, near))}?" if near else ""
        raise SettingsError(f"settings file {file}: {cause.strerror}{hint}") from cause
    except OSError as cause:
        raise SettingsError(f"settings file {file}: {cause.strerror}") from cause
    except ValueError as cause:
        raise SettingsError(f"settings file {named} is not valid TOML: {cause}") from cause
    return file


def _near_files(file: Path) -> list[Path]:
    there = [other.name for other in file.parent.iterdir() if other.is_file()] if file.parent.is_dir() else []
    return [file.with_name(name) for name, _, _ in process.extract(file.name, there, limit=2, score_cutoff=75)]
