"""The manifest of a published intervention (`manifest.json`) and the fingerprint of its base model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from reftserve.interventions.intervention_errors import FingerprintMismatch

SCHEMA_VERSION = 2
MAX_EDITS = 4096
LARGEST = 2**31 - 1  # of an integer in every database

Name = Annotated[str, StringConstraints(max_length=256)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Layer = Annotated[int, Field(ge=0, le=LARGEST)]


@dataclass(frozen=True)
class Mismatch:
    """A field in which two fingerprints differ. fatal: the operator cannot override it."""

    field: str
    expected: object
    found: object
    fatal: bool

    def __str__(self) -> str:
        return f"{self.field} is {self.found!r}, the base has {self.expected!r}"


class BaseFingerprint(BaseModel):
    """Identity of a base model. A hash of None is unknown: imported interventions have none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Name
    hidden_size: Count
    num_layers: Count
    vocab_size: Count
    weights_hash: Name | None = None
    tokenizer_hash: Name | None = None
    chat_template_hash: Name | None = None

    def mismatches(self, found: BaseFingerprint) -> list[Mismatch]:
        """Return the fields in which `found` differs from this base; hashes can be overridden."""
        hashes = {"weights_hash", "tokenizer_hash", "chat_template_hash"}
        return [
            Mismatch(name, getattr(self, name), getattr(found, name), fatal=name not in hashes)
            for name in type(self).model_fields
            if getattr(self, name) != getattr(found, name)
        ]

    def require(self, found: BaseFingerprint, *, override: bool = False) -> None:
        """Raise FingerprintMismatch, naming every differing field; `override` allows differing hashes."""
        wrong = [m for m in self.mismatches(found) if m.fatal or not override]
        if wrong:
            raise FingerprintMismatch(f"made for another base model: {'; '.join(map(str, wrong))}")


class EditEntry(BaseModel):
    """One edit of the artifact. Its columns follow those of the previous entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: Layer
    positions: Name
    rank: Count


class Provenance(BaseModel):
    """Where an intervention comes from; unknown fields are absent."""

    model_config = ConfigDict(extra="allow")

    source: str | None = None
    dataset_hash: str | None = None
    hyperparameters: dict[str, Any] | None = None
    losses: dict[str, float] | None = None
    scores: dict[str, dict[str, float]] | None = None
    seconds: float | None = None
    seed: int | None = None
    code_version: str | None = None


class Manifest(BaseModel):
    """Everything about an intervention except its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    family: Name
    positions: Name
    layers: list[Layer] = Field(max_length=MAX_EDITS)
    rank: Count
    tied: bool = True
    parameters: int = Field(
        ge=0, le=LARGEST, description="Numbers that were trained: at most those that the edits hold"
    )
    edits: list[EditEntry] = Field(min_length=1, max_length=MAX_EDITS)
    base: BaseFingerprint
    content_hash: str = Field(pattern="^[0-9a-f]{64}$")
    created_at: datetime
    provenance: Provenance = Provenance()

    @field_validator("schema_version")
    @classmethod
    def _is_ours(cls, found: int) -> int:
        if found != SCHEMA_VERSION:
            raise ValueError(f"is {found}; expected {SCHEMA_VERSION}: publish the intervention again")
        return found
