"""Errors of the interventions package.

    InterventionError
    ├── ShapeError            a tensor's shape does not fit
    ├── DtypeError            a tensor's element type does not fit
    ├── NonFiniteError        NaN or infinity where numbers must be
    ├── PositionsError        positions that cannot be parsed
    ├── ManifestError         a manifest or artifact that is not of the format
    ├── HashMismatch          the content is not what its hash says
    └── FingerprintMismatch   made for another base model

Each message has the offending value and what would be right.
"""

from __future__ import annotations


class InterventionError(ValueError):
    """Anything wrong with an intervention."""

    code = "invalid_intervention"


class ShapeError(InterventionError):
    """A tensor's shape does not fit."""

    code = "shape_mismatch"


class DtypeError(InterventionError):
    """A tensor's element type does not fit."""

    code = "dtype_mismatch"


class NonFiniteError(InterventionError):
    """NaN or infinity where numbers must be."""

    code = "non_finite"


class PositionsError(InterventionError):
    """Positions that cannot be parsed."""

    code = "invalid_positions"


class ManifestError(InterventionError):
    """A manifest or artifact that is not of the format."""

    code = "invalid_artifact"


class HashMismatch(InterventionError):
    """The content is not what its hash says."""

    code = "hash_mismatch"


class FingerprintMismatch(InterventionError):
    """Made for another base model."""

    code = "fingerprint_mismatch"
