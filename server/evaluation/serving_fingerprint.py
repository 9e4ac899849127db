"""The serving fingerprint: base, dtype and quantization. Scores depend only on it, the data and the interventions."""

from __future__ import annotations

from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.base.folder import Base
from reftserve.server.errors import Unavailable


class ServingFingerprint(BaseFingerprint):
    """The base, and how the engine computes it."""

    dtype: str
    quantization: str


def serving_fingerprint(base: Base, *, dtype: str | None, quantization: str) -> ServingFingerprint:
    """Return the engine's fingerprint. Raises Unavailable without the dtype, which a ready engine reports."""
    if dtype is None:
        raise Unavailable("the engine is not ready yet; ask again in a moment")
    return ServingFingerprint(**base.fingerprint.model_dump(), dtype=dtype, quantization=quantization)
