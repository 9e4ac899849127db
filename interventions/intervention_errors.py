"""Errors of the interventions package.

    InterventionError
    ├── ShapeError            a tensor's shape does not fit
    ├── DtypeError            a tensor's element type does not fit
    ├── NonFiniteError        a number is NaN or infinity
    ├── PositionsError        positions cannot be parsed
    ├── ManifestError         a manifest or artifact does not follow the format
    ├── HashMismatch          the content does not have its hash
    └── FingerprintMismatch   made for another base model

Each message names the offending value, of which it quotes at most MAX_QUOTED characters, and the expected one.
"""

from __future__ import annotations

MAX_QUOTED = 200


def shorten(text: str) -> str:
    """Return a text of at most MAX_QUOTED characters, for messages about what was sent."""
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"


class InterventionError(ValueError):
    """An intervention is invalid."""

    code = "invalid_intervention"


class ShapeError(InterventionError):
    """A tensor's shape does not fit."""

    code = "shape_mismatch"


class DtypeError(InterventionError):
    """A tensor's element type does not fit."""

    code = "dtype_mismatch"


class NonFiniteError(InterventionError):
    """A number is NaN or infinity."""

    code = "non_finite"


class PositionsError(InterventionError):
    """Positions cannot be parsed."""

    code = "invalid_positions"


class ManifestError(InterventionError):
    """A manifest or artifact does not follow the format."""

    code = "invalid_artifact"


class HashMismatch(InterventionError):
    """The content does not have its hash."""

    code = "hash_mismatch"


class FingerprintMismatch(InterventionError):
    """The intervention was made for another base model."""

    code = "fingerprint_mismatch"
