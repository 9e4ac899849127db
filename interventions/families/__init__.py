"""The families, one file each: trainable modules that lower to edits.

A new family adds a file and a line below; the recipe and the API take its name from here. Its name also stands in the
help of `client/cli_jobs.py` and in docs/http.md. `tests/interventions/test_pyreft_parity.py` requires pyreft's values
for every family: add it to `tests/references/make_pyreft_reference.py` and make the reference files again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftserve.interventions.families.base import Family

# A family's name is that of its file, and beside it stands its class.
_CLASSES = {
    "loreft": "LoReFT",
    "noreft": "NoReFT",
    "direft": "DiReFT",
    "consreft": "ConsReFT",
    "lobireft": "LobiReFT",
    "nodireft": "NodiReFT",
}


class _Families(Mapping[str, "type[Family]"]):
    """Families by name. Their modules, and torch with them, are loaded when one is looked up: a name needs neither."""

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

if not TYPE_CHECKING:  # for the type checker, a module with a __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name != "Family":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.base").Family
