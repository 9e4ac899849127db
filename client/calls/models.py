"""Calls that ask for the models and for the server's state."""

from __future__ import annotations

from reftserve.client.calls.call import Call, listed, one
from reftserve.client.schemas import Model, Page, Readiness


def list_models() -> Call[list[Model]]:
    """GET /v1/models. The base is the first."""
    return Call("GET", "/v1/models", listed(Page[Model]))


def readiness() -> Call[Readiness]:
    """GET /ready."""
    return Call("GET", "/ready", one(Readiness))
