"""/v1/interventions: names, versions, aliases and training histories; native."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reftserve.client.schemas.base import Request, Response
from reftserve.client.schemas.bounds import Count


class InterventionInfo(Response):
    """An intervention's name with its versions and aliases, `latest` included."""

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
    """Training history of a version, in columns of equal length: one row per step, but at most 1,000 rows.

    tokens_per_second: completion tokens trained on. valid: scores of the held-out part (`loss`, `exact_match`, ...).
    None marks a number that is unknown or not finite.
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

    version: Count
