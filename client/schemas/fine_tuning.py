"""/v1/fine_tuning/jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from reftserve.client.schemas.base import Identifier, Request, Response
from reftserve.client.schemas.data_report import DataReport

Auto = Literal["auto"]


class SupervisedHyperparameters(Request):
    """OpenAI's knobs; "auto" or absent leaves each to the recipe."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


class SupervisedMethod(Request):
    """The sensible recipe."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class ReftHyperparameters(Request):
    """How a LoReFT intervention is trained; what is absent the recipe decides.

    max_length: tokens. early_stopping_epochs: end when the validation loss has not become better for so many.
    """

    n_epochs: int | None = Field(None, ge=1, le=1000)
    batch_size: int | None = Field(None, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, le=1)
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float | None = Field(None, ge=0, le=1)
    max_length: int | None = Field(None, ge=2)
    early_stopping_epochs: int | None = Field(None, ge=1, le=1000)


class Range(Request):
    """Any number from `low` to `high`; log: as many from each power of ten."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    log: bool = True

    @model_validator(mode="after")
    def _is_ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high, {self.high}")
        return self


class ReftSweep(Request):
    """What trials differ in: values to choose from. trials: how many combinations are tried at most."""

    layers: list[list[int] | Literal["all"]] | None = Field(None, min_length=1, max_length=64)
    positions: list[str] | None = Field(None, min_length=1, max_length=64)
    rank: list[int] | None = Field(None, min_length=1, max_length=64)
    learning_rate: list[float] | Range | None = None
    dropout: list[float] | Range | None = None
    trials: int = Field(8, ge=2, le=64)


class ReftMethod(Request):
    """What is trained; what is absent the recipe decides.

    hyperparameters: "auto" also tries several candidates for what is left open. sweep: fields that trials vary, the
    best is published; it takes the place of these candidates.
    """

    family: str | None = None
    layers: list[int] | Literal["all"] | None = None
    positions: str | None = None
    rank: int | None = Field(None, ge=1, le=1024)
    dropout: float | None = Field(None, ge=0, lt=1)
    tied: bool | None = None
    hyperparameters: ReftHyperparameters | Auto = "auto"
    sweep: ReftSweep | None = None


class Method(Request):
    """`method` of a fine-tuning job."""

    type: Literal["supervised", "reft"]
    supervised: SupervisedMethod | None = None
    reft: ReftMethod | None = None


class FineTuningJobCreate(Request):
    """POST /v1/fine_tuning/jobs. suffix: the intervention's name."""

    model: Identifier
    training_file: Identifier
    validation_file: Identifier | None = None
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = Field(None, max_length=0)


JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]


class JobError(Response):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(Response):
    """A training run. fine_tuned_model: `name@version` once it is published. data_report: what it learns from.

    plan: every decision, those that the user left open included; `sweep` has the candidates or trials. After the job's
    success the rest is that of the one which was published, and `choices` says why it was chosen.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str = "default"
    result_files: list[str] = Field(default_factory=list)
    status: JobStatus
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    method: dict[str, Any] | None = None
    plan: dict[str, Any] = Field(default_factory=dict)
    data_report: DataReport | None = None
    error: JobError | None = None
    seed: int
    estimated_finish: int | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] = Field(default_factory=list)


class FineTuningEvent(Response):
    """Something that happened in a job; `data` has the numbers of a metrics event."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class FineTuningCheckpoint(Response):
    """A durable step of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
