"""/v1/interventions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reftserve.client.schemas.base import Request, Response


class InterventionInfo(Response):
    """A name with its versions and aliases; `latest` is one of the aliases."""

    name: str
    object: Literal["intervention"] = "intervention"
    latest: int | None
    versions: list[int]
    aliases: dict[str, int]
    created_at: int


class InterventionVersion(Response):
    """A published, immutable version."""

    id: str
    object: Literal["intervention.version"] = "intervention.version"
    name: str
    version: int
    content_hash: str
    bytes: int
    parameters: int
    manifest: dict[str, Any]
    created_at: int
    job_id: str | None = None


class InterventionHistory(Response):
    """How a version was trained: columns of equal length, a row for each step, or for each of 1,000 of very many.

    tokens_per_second: completion tokens learned from; empty where nobody measured.
    valid: the scores of the held-out part (`loss`, `exact_match`, ...) after the steps at which it was scored; None at
    the others, as wherever a number is unknown or was not finite.
    """

    id: str
    object: Literal["intervention.history"] = "intervention.history"
    step: list[int]
    train_loss: list[float | None]
    learning_rate: list[float | None]
    tokens_per_second: list[float | None] = Field(default_factory=list)
    valid: dict[str, list[float | None]]


class AliasUpdate(Request):
    """PUT /v1/interventions/{name}/aliases/{alias}."""

    version: int = Field(ge=1)
