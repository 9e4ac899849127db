"""The families, one file each: trainable modules that lower to edits.

A new family adds a file and a line below, and its name to `client/cli_jobs.py` and docs/http.md. The parity test
requires pyreft's values: add the family to `tests/references/make_pyreft_reference.py` and run that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftserve.interventions.families.base import Family

_CLASSES = {
    "loreft": "LoReFT",
    "noreft": "NoReFT",
    "direft": "DiReFT",
    "consreft": "ConsReFT",
    "lobireft": "LobiReFT",
    "nodireft": "NodiReFT",
}


class _Families(Mapping[str, "type[Family]"]):
    """Families by name. Looking one up loads its module, and torch with it; names alone need neither."""

    def __getitem__(self, name: str) -> type[Family]:
        class_name = _CLASSES[name]
        found: type[Family] = getattr(importlib.import_module(f"{__name__}.{name}"), class_name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


FAMILIES: Mapping[str, type[Family]] = _Families()

__all__ = ["FAMILIES", "Family"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "Family":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.base").Family
