"""Calls that ask for the models and for the server's state."""

from __future__ import annotations

from reftserve.client.calls.call import Call, given, one
from reftserve.client.schemas import Model, Page, Readiness


def list_models(after: str | None) -> Call[Page[Model]]:
    """GET /v1/models: the page behind the model `after`. The base is the first of all."""
    return Call("GET", "/v1/models", one(Page[Model]), params=given({"after": after}))


def readiness() -> Call[Readiness]:
    """GET /ready."""
    return Call("GET", "/ready", one(Readiness))
