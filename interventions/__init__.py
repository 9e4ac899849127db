"""The mathematics of interventions: edits, families, positions, artifacts. Imports neither the server nor the client.

Each name imports its module at first use, so a process that only checks artifacts never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftserve.interventions.artifact import (
        Artifact,
        EditSite,
        check_artifact,
        load_history,
        pack,
        read_artifact,
        unpack,
    )
    from reftserve.interventions.attachment import attach
    from reftserve.interventions.base_fingerprint import fingerprint
    from reftserve.interventions.checksum import model_checksum
    from reftserve.interventions.columns import Activation
    from reftserve.interventions.config import InterventionConfig
    from reftserve.interventions.edit import LowRankEdit, PlacedEdit, activate, compose
    from reftserve.interventions.families import FAMILIES, Family
    from reftserve.interventions.history import History
    from reftserve.interventions.intervention import Intervention, load_artifact, parse_artifact, save_artifact
    from reftserve.interventions.intervention_errors import (
        DtypeError,
        FingerprintMismatch,
        HashMismatch,
        InterventionError,
        ManifestError,
        NonFiniteError,
        PositionsError,
        ShapeError,
    )
    from reftserve.interventions.layers import decoder_layers, edit_layer
    from reftserve.interventions.manifest import BaseFingerprint, EditEntry, Manifest, Provenance
    from reftserve.interventions.positions import Positions
    from reftserve.interventions.trainable import TrainableIntervention

_MODULES = {
    "artifact": ("Artifact", "EditSite", "check_artifact", "load_history", "pack", "read_artifact", "unpack"),
    "attachment": ("attach",),
    "columns": ("Activation",),
    "config": ("InterventionConfig",),
    "edit": ("LowRankEdit", "PlacedEdit", "activate", "compose"),
    "families": ("FAMILIES", "Family"),
    "base_fingerprint": ("fingerprint",),
    "history": ("History",),
    "intervention": ("Intervention", "load_artifact", "parse_artifact", "save_artifact"),
    "intervention_errors": (
        "DtypeError",
        "FingerprintMismatch",
        "HashMismatch",
        "InterventionError",
        "ManifestError",
        "NonFiniteError",
        "PositionsError",
        "ShapeError",
    ),
    "layers": ("decoder_layers", "edit_layer"),
    "manifest": ("BaseFingerprint", "EditEntry", "Manifest", "Provenance"),
    "checksum": ("model_checksum",),
    "positions": ("Positions",),
    "trainable": ("TrainableIntervention",),
}
# Importing a module binds its name in this package, so no module may have the name of something it defines.
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "FAMILIES",
    "Activation",
    "Artifact",
    "BaseFingerprint",
    "DtypeError",
    "EditEntry",
    "EditSite",
    "Family",
    "FingerprintMismatch",
    "HashMismatch",
    "History",
    "Intervention",
    "InterventionConfig",
    "InterventionError",
    "LowRankEdit",
    "Manifest",
    "ManifestError",
    "NonFiniteError",
    "PlacedEdit",
    "Positions",
    "PositionsError",
    "Provenance",
    "ShapeError",
    "TrainableIntervention",
    "activate",
    "attach",
    "check_artifact",
    "compose",
    "decoder_layers",
    "edit_layer",
    "fingerprint",
    "load_artifact",
    "load_history",
    "model_checksum",
    "pack",
    "parse_artifact",
    "read_artifact",
    "save_artifact",
    "unpack",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
