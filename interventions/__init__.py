"""The mathematics of interventions: edits, families, positions, artifacts. Knows neither server nor client."""

from reftserve.interventions.artifact import (
    EditSite,
    Intervention,
    load_artifact,
    load_history,
    pack,
    parse_artifact,
    read_artifact,
    save_artifact,
    unpack,
)
from reftserve.interventions.attach import attach
from reftserve.interventions.edit import Activation, LowRankEdit, PlacedEdit, activate, compose
from reftserve.interventions.families import FAMILIES, Family
from reftserve.interventions.fingerprint import fingerprint, model_checksum
from reftserve.interventions.history import History
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
from reftserve.interventions.trainable import InterventionConfig, TrainableIntervention

__all__ = [
    "FAMILIES",
    "Activation",
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
