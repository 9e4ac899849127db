"""What scores depend on beside data and interventions: a run begins and ends on the same."""

from __future__ import annotations

from reftserve.interventions import BaseFingerprint
from reftserve.server.base.folder import Base
from reftserve.server.base.model import resolve_device, resolve_dtype
from reftserve.server.settings import Settings


class ServingFingerprint(BaseFingerprint):
    """The base, and how the engine computes it."""

    dtype: str
    quantization: str


def serving_fingerprint(settings: Settings, base: Base) -> ServingFingerprint:
    """What a server with these settings answers with."""
    dtype = resolve_dtype(settings.dtype, resolve_device(settings.device))
    return ServingFingerprint(
        **base.fingerprint.model_dump(),
        dtype=str(dtype).removeprefix("torch."),
        quantization=settings.quantization,
    )
