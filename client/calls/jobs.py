"""Calls for training jobs, and the options of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from reftserve.client.calls.call import Call, given, listed, one
from reftserve.client.schemas import DataReport, FineTuningCheckpoint, FineTuningJob, Page

JobAction = Literal["cancel", "pause", "resume", "retry"]
_SHAPE = ("family", "layers", "positions", "rank", "dropout", "tied", "sweep")


class TrainingOptions(TypedDict, total=False):
    """What to train; the server's recipe decides each absent option. max_length: tokens. sweep: as `ReftSweep`.

    early_stopping_epochs: end after this number of epochs without a better validation loss.
    """

    family: str | None
    layers: Sequence[int] | str | None
    positions: str | None
    rank: int | None
    dropout: float | None
    tied: bool | None
    n_epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    warmup_ratio: float | None
    weight_decay: float | None
    max_length: int | None
    early_stopping_epochs: int | None
    sweep: Mapping[str, Any] | None


def create_job(
    model: str,
    training_file: str,
    options: TrainingOptions,
    *,
    name: str,
    validation_file: str | None,
    seed: int | None,
    metadata: Mapping[str, str] | None,
) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs. training_file, validation_file: ids."""
    body = {
        **_training(model, training_file, validation_file, seed, options),
        "suffix": name,
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", "/v1/fine_tuning/jobs", one(FineTuningJob), json=given(body))


def check_data(
    model: str, training_file: str, options: TrainingOptions, *, validation_file: str | None, seed: int | None
) -> Call[DataReport]:
    """POST /v1/fine_tuning/validate. training_file, validation_file: ids."""
    body = _training(model, training_file, validation_file, seed, options)
    return Call("POST", "/v1/fine_tuning/validate", one(DataReport), json=given(body))


def list_jobs(after: str | None, limit: int) -> Call[list[FineTuningJob]]:
    """GET /v1/fine_tuning/jobs."""
    params = given({"after": after, "limit": limit})
    return Call("GET", "/v1/fine_tuning/jobs", listed(Page[FineTuningJob]), params=params)


def get_job(job_id: str) -> Call[FineTuningJob]:
    """GET /v1/fine_tuning/jobs/{id}."""
    return Call("GET", f"/v1/fine_tuning/jobs/{job_id}", one(FineTuningJob))


def change_job(job_id: str, action: JobAction) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs/{id}/{action}."""
    return Call("POST", f"/v1/fine_tuning/jobs/{job_id}/{action}", one(FineTuningJob))


def stream_events(job_id: str, last: str | None, read_timeout_s: float) -> Call[None]:
    """GET /v1/fine_tuning/jobs/{id}/events as a stream that begins after the event with id `last`."""
    path = f"/v1/fine_tuning/jobs/{job_id}/events"
    headers = {"Accept": "text/event-stream", **given({"Last-Event-ID": last})}
    params = {"stream": True}
    return Call("GET", path, lambda _: None, params=params, headers=headers, read_timeout_s=read_timeout_s)


def list_checkpoints(job_id: str) -> Call[list[FineTuningCheckpoint]]:
    """GET /v1/fine_tuning/jobs/{id}/checkpoints."""
    return Call("GET", f"/v1/fine_tuning/jobs/{job_id}/checkpoints", listed(Page[FineTuningCheckpoint]))


def _training(
    model: str, training_file: str, validation_file: str | None, seed: int | None, options: TrainingOptions
) -> dict[str, Any]:
    return {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "seed": seed,
        "method": _method(given(options)),
    }


def _method(options: dict[str, Any]) -> dict[str, Any] | None:
    if not options:
        return None
    layers = options.get("layers")
    if layers is not None and not isinstance(layers, str):
        options["layers"] = list(layers)
    shape = {name: options.pop(name) for name in tuple(options) if name in _SHAPE}
    return {"type": "reft", "reft": {**shape, "hyperparameters": options or "auto"}}
