"""The serving fingerprint identifies base, dtype and quantization; a run keeps one from its first item to its last.

Apart from data and interventions, scores depend on nothing else.
"""

from __future__ import annotations

from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.base.folder import Base
from reftserve.server.errors import Unavailable


class ServingFingerprint(BaseFingerprint):
    """The base, and how the engine computes it."""

    dtype: str
    quantization: str


def serving_fingerprint(base: Base, *, dtype: str | None, quantization: str) -> ServingFingerprint:
    """Return the engine's fingerprint. dtype: as the ready engine reported it; None: it has not been ready yet.

    Raises Unavailable without a dtype: only the engine knows what `auto` means on its machine.
    """
    if dtype is None:
        raise Unavailable("the engine is not ready yet; ask again in a moment")
    return ServingFingerprint(**base.fingerprint.model_dump(), dtype=dtype, quantization=quantization)
