"""Names of interventions and aliases, and references to versions (`name`, `name@3`, `name@alias`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rapidfuzz import process, utils

from reftserve.server.errors import InvalidRequest

LATEST = "latest"
MAX_DIGITS = 18  # of a version number; every database can store this integer
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Reference:
    """A name and a version, which is a number or an alias."""

    name: str
    version: int | str = LATEST

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse `name`, `name@3` or `name@alias` without looking it up."""
        name, at, version = text.partition("@")
        if not at:
            return cls(name)
        is_number = version.isascii() and version.isdecimal() and len(version) <= MAX_DIGITS
        return cls(name, int(version) if is_number else version)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def check_name(name: str, param: str = "name") -> str:
    """Return an intervention's name. Raises InvalidRequest when it is not a valid one."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{param} is {name!r}; expected 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
            param=param,
            code="invalid_name",
        )
    return name


def check_free(name: str, base: str, param: str = "name") -> None:
    """Raise InvalidRequest for the base's name: requests with it get the base, so the intervention is out of reach."""
    if name == base:
        raise InvalidRequest(
            f"{param} is {name!r}, the base model's; requests with this name get the base, never an intervention",
            param=param,
            code="invalid_name",
        )


def check_alias(alias: str) -> str:
    """Return a user's alias. Raises InvalidRequest when it is invalid, all digits (a version) or `latest`."""
    check_name(alias, "alias")
    if alias.isdecimal():
        raise InvalidRequest(f"alias {alias!r} is all digits, as a version is", param="alias", code="invalid_name")
    if alias == LATEST:
        raise InvalidRequest("alias 'latest' is reserved: each publish moves it", param="alias", code="invalid_name")
    return alias


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests similar names; empty when none is similar."""
    near = process.extract(name, list(known), limit=3, score_cutoff=60, processor=utils.default_process)
    return f" Did you mean {' or '.join(repr(candidate) for candidate, _, _ in near)}?" if near else ""
