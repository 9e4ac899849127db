"""/v1/fine_tuning/jobs: OpenAI's shapes, and the native method `reft`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from reftserve.client.schemas.base import Identifier, Request, Response
from reftserve.client.schemas.data_report import DataReport

Auto = Literal["auto"]


class SupervisedHyperparameters(Request):
    """OpenAI's hyperparameters; the recipe decides each one that is "auto" or absent."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


class SupervisedMethod(Request):
    """The default recipe."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class ReftHyperparameters(Request):
    """Training of an intervention; the recipe decides absent fields. max_length: tokens.

    early_stopping_epochs: epochs without a better validation loss after which training ends.
    """

    n_epochs: int | None = Field(None, ge=1, le=1000)
    batch_size: int | None = Field(None, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, le=1)
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float | None = Field(None, ge=0, le=1)
    max_length: int | None = Field(None, ge=2)
    early_stopping_epochs: int | None = Field(None, ge=1, le=1000)


class Range(Request):
    """Any number from `low` to `high`. log: uniform in the logarithm."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    log: bool = True

    @model_validator(mode="after")
    def _is_ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}; expected at most high, {self.high}")
        return self


class ReftSweep(Request):
    """Values that trials choose from. trials: greatest number of combinations to try."""

    layers: list[list[int] | Literal["all"]] | None = Field(None, min_length=1, max_length=64)
    positions: list[str] | None = Field(None, min_length=1, max_length=64)
    rank: list[int] | None = Field(None, min_length=1, max_length=64)
    learning_rate: list[float] | Range | None = None
    dropout: list[float] | Range | None = None
    trials: int = Field(8, ge=2, le=64)


class ReftMethod(Request):
    """The intervention to train; the recipe decides absent fields.

    hyperparameters: "auto" also tries several candidates for absent fields, or sweep's values. The best is published.
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
    """Method of a fine-tuning job."""

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
    """Reason why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(Response):
    """A training run. fine_tuned_model: `name@version` once it is published. data_report: the report on its data.

    plan: the user's and the recipe's decisions, of the published trial after success; `choices` says why it was chosen.
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
    """An event of a job. data: numbers of a metrics event, of the newest step if it reports several."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The metrics of the steps that the event reports, oldest first; none for events that report no step."""
        data = self.data or {}
        if "step" not in data:
            return []
        newest = {name: value for name, value in data.items() if name != "earlier"}
        return [*({**_at_the_end(newest), **step} for step in data.get("earlier", [])), newest]


def _at_the_end(step: dict[str, Any]) -> dict[str, Any]:
    return {name: step[name] for name in ("total_steps", "eta_s") if name in step}


class FineTuningCheckpoint(Response):
    """A durable step of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
