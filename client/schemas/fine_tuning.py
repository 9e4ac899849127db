"""/v1/fine_tuning/jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reftserve.client.schemas.base import Request, Response
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
    """How a LoReFT intervention is trained; what is absent the recipe decides. max_length: tokens."""

    n_epochs: int | None = Field(None, ge=1, le=1000)
    batch_size: int | None = Field(None, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, le=1)
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float | None = Field(None, ge=0, le=1)
    max_length: int | None = Field(None, ge=2)


class ReftMethod(Request):
    """What is trained; what is absent the recipe decides."""

    family: str | None = None
    layers: list[int] | Literal["all"] | None = None
    positions: str | None = None
    rank: int | None = Field(None, ge=1, le=1024)
    dropout: float | None = Field(None, ge=0, lt=1)
    tied: bool | None = None
    hyperparameters: ReftHyperparameters = ReftHyperparameters()


class Method(Request):
    """`method` of a fine-tuning job."""

    type: Literal["supervised", "reft"]
    supervised: SupervisedMethod | None = None
    reft: ReftMethod | None = None


class FineTuningJobCreate(Request):
    """POST /v1/fine_tuning/jobs. suffix: the intervention's name."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = Field(None, max_length=0)


JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class JobError(Response):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(Response):
    """A training run. fine_tuned_model: `name@version` once it is published. data_report: what it learns from."""

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
