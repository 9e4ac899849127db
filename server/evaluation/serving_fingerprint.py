"""What scores depend on beside data and interventions: a run begins and ends on the same."""

from __future__ import annotations

from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.base.folder import Base
from reftserve.server.errors import Unavailable


class ServingFingerprint(BaseFingerprint):
    """The base, and how the engine computes it."""

    dtype: str
    quantization: str


def serving_fingerprint(base: Base, *, dtype: str | None, quantization: str) -> ServingFingerprint:
    """Return what the engine answers with. dtype: what it said when it was ready; None: it never was.

    Raises Unavailable when the engine has not been ready yet: it alone knows what `auto` is on this machine.
    """
    if dtype is None:
        raise Unavailable("the engine is not ready yet; ask again in a moment")
    return ServingFingerprint(**base.fingerprint.model_dump(), dtype=dtype, quantization=quantization)
