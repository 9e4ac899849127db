"""What each method of the clients says to the server; the blocking and the asynchronous client share it.

A `Call` is an HTTP request that is not yet sent, with the way to read its answer.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeGuard, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from reftserve.client.schemas import (
    ChatCompletion,
    ChatMessage,
    Classification,
    Completion,
    DataReport,
    Deleted,
    Eval,
    EvalOutputItem,
    EvalRun,
    FileObject,
    FineTuningCheckpoint,
    FineTuningJob,
    InterventionHistory,
    InterventionInfo,
    InterventionUse,
    InterventionVersion,
    Model,
    Page,
    Readiness,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Messages = str | Sequence[ChatMessage | Mapping[str, Any]]
Interventions = Sequence[str | InterventionUse | Mapping[str, Any]]
Criteria = Sequence[str | Mapping[str, Any]]
ARTIFACT_FILES = ("manifest.json", "edits.safetensors")
HISTORY_FILE = "history.json"


class GenerationOptions(TypedDict, total=False):
    """How to generate; what is absent the server decides.

    model: the base's id, or an intervention as `name`, `name@version` or `name@alias`; the base when absent.
    interventions: composed on top of it; each as `name@version`, or with a scale as InterventionUse or a dict.
    logprobs: for chats whether, for texts how many alternatives. response_format, structured_outputs: what the answer
    must look like, as in the HTTP reference. priority: lower goes first. timeout: seconds until it ends with an error.
    """

    model: str | None
    interventions: Interventions | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    logprobs: bool | int | None
    top_logprobs: int | None
    echo: bool | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    priority: int | None
    timeout: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    n: int | None
    ignore_eos: bool | None
    cache_salt: str | None


class ClassifyOptions(TypedDict, total=False):
    """How to classify. model, interventions, priority, timeout: as in generation.

    normalize: "tokens" compares labels by their mean log-probability a token.
    """

    model: str | None
    interventions: Interventions | None
    normalize: str | None
    priority: int | None
    timeout: float | None
    cache_salt: str | None


class TrainingOptions(TypedDict, total=False):
    """What to train; what is absent the recipe decides.

    max_length: tokens. early_stopping_epochs: end when the validation loss has not become better for so many. sweep:
    fields of `ReftSweep`; of all trials the best is published.
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


@dataclass(frozen=True)
class Upload:
    """The file part of a multipart body; a path is opened anew for each attempt."""

    name: str
    content: bytes | Path


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and how to read its answer.

    read_timeout_s: for how long the answer may be silent; the client's default when None.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    json: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    read_timeout_s: float | None = None
    form: Mapping[str, str] = field(default_factory=dict)
    upload: Upload | None = None

    @property
    def is_idempotent(self) -> bool:
        """Whether sending it twice does what sending it once does."""
        return self.method in ("GET", "PUT", "DELETE")


def _reads(model: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: model.model_validate_json(response.content)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# --- Generation


def chat_body(model: str, messages: Messages, options: GenerationOptions) -> dict[str, Any]:
    """Body of POST /v1/chat/completions. A string is one user message."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    rows = [turn.model_dump(exclude_none=True) if isinstance(turn, ChatMessage) else dict(turn) for turn in turns]
    return {**_named(model, options), "messages": rows}


def completion_body(model: str, prompt: str | Sequence[int], options: GenerationOptions) -> dict[str, Any]:
    """Body of POST /v1/completions. prompt: text or token ids."""
    return {**_named(model, options), "prompt": prompt if isinstance(prompt, str) else list(prompt)}


def _named(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, with what runs."""
    body = _given(options)
    body["model"] = model
    if "interventions" in body:
        body["interventions"] = [_use(item) for item in body["interventions"]]
    return body


def _use(item: str | InterventionUse | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(item, str):
        name, _, version = item.partition("@")
        return _given({"name": name, "version": version or None})
    return item.model_dump(exclude_none=True) if isinstance(item, InterventionUse) else dict(item)


def chat(body: Mapping[str, Any]) -> Call[ChatCompletion]:
    """POST /v1/chat/completions."""
    return Call("POST", "/v1/chat/completions", _reads(ChatCompletion), json=body)


def generate(body: Mapping[str, Any]) -> Call[Completion]:
    """POST /v1/completions."""
    return Call("POST", "/v1/completions", _reads(Completion), json=body)


def classify(
    model: str,
    text: str | Sequence[str] | None,
    messages: Sequence[Any] | None,
    labels: Sequence[str],
    options: ClassifyOptions,
) -> Call[Classification]:
    """POST /v1/classify."""
    inputs = {
        "input": text if text is None or isinstance(text, str) else list(text),
        "messages": None if messages is None else _turns(messages),
        "labels": list(labels),
    }
    body = {**_named(model, options), **_given(inputs)}
    return Call("POST", "/v1/classify", _reads(Classification), json=body)


def _turns(messages: Sequence[Any]) -> list[Any]:
    """Turns of a conversation, or of several, as JSON."""
    return [
        turn.model_dump(exclude_none=True)
        if isinstance(turn, ChatMessage)
        else dict(turn)
        if isinstance(turn, Mapping)
        else _turns(turn)
        for turn in messages
    ]


def either(
    model: str, prompt: str | Sequence[int] | None, messages: Messages | None, options: GenerationOptions
) -> Call[Any]:
    """The call for a prompt or for messages.

    Raises TypeError unless exactly one of them is given.
    """
    if messages is not None and prompt is None:
        return chat(chat_body(model, messages, options))
    if prompt is not None and messages is None:
        return generate(completion_body(model, prompt, options))
    raise TypeError("give either a prompt or messages")


def streamed(call: Call[Any]) -> Call[None]:
    """The same call, answered piece by piece."""
    body = {**call.json, "stream": True, "stream_options": {"include_usage": True}}
    return Call(call.method, call.path, lambda _: None, json=body)


# --- Models and health


def list_models() -> Call[list[Model]]:
    """GET /v1/models; the base is the first."""
    return Call("GET", "/v1/models", lambda response: _reads(Page[Model])(response).data)


def readiness() -> Call[Readiness]:
    """GET /ready."""
    return Call("GET", "/ready", _reads(Readiness))


# --- Files


def upload_file(file: str | Path | bytes, purpose: str, filename: str | None) -> Call[FileObject]:
    """POST /v1/files."""
    content = file if isinstance(file, bytes) else Path(file)
    default_name = content.name if isinstance(content, Path) else "upload.jsonl"
    upload = Upload(filename or default_name, content)
    return Call("POST", "/v1/files", _reads(FileObject), form={"purpose": purpose}, upload=upload)


def is_file_id(file: str | Path) -> TypeGuard[str]:
    """Whether this names an uploaded file rather than a path."""
    return isinstance(file, str) and file.startswith("file-")


def list_files(purpose: str | None) -> Call[list[FileObject]]:
    """GET /v1/files."""
    read = _reads(Page[FileObject])
    return Call("GET", "/v1/files", lambda response: read(response).data, params=_given({"purpose": purpose}))


def get_file(file_id: str) -> Call[FileObject]:
    """GET /v1/files/{id}."""
    return Call("GET", f"/v1/files/{file_id}", _reads(FileObject))


def file_content(file_id: str) -> Call[bytes]:
    """GET /v1/files/{id}/content."""
    return Call("GET", f"/v1/files/{file_id}/content", lambda response: response.content)


def delete_file(file_id: str) -> Call[Deleted]:
    """DELETE /v1/files/{id}."""
    return Call("DELETE", f"/v1/files/{file_id}", _reads(Deleted))


# --- Fine-tuning jobs


def create_job(
    model: str,
    training_file: str,
    *,
    name: str,
    validation_file: str | None,
    seed: int | None,
    metadata: Mapping[str, str] | None,
    **options: Unpack[TrainingOptions],
) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs. training_file, validation_file: ids."""
    body = {
        **_data(model, training_file, validation_file, seed, options),
        "suffix": name,
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", "/v1/fine_tuning/jobs", _reads(FineTuningJob), json=_given(body))


def check_data(
    model: str,
    training_file: str,
    *,
    validation_file: str | None,
    seed: int | None,
    **options: Unpack[TrainingOptions],
) -> Call[DataReport]:
    """POST /v1/fine_tuning/validate. training_file, validation_file: ids."""
    body = _data(model, training_file, validation_file, seed, options)
    return Call("POST", "/v1/fine_tuning/validate", _reads(DataReport), json=_given(body))


def _data(
    model: str, training_file: str, validation_file: str | None, seed: int | None, options: TrainingOptions
) -> dict[str, Any]:
    return {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "seed": seed,
        "method": _method(_given(options)),
    }


def _method(options: dict[str, Any]) -> dict[str, Any] | None:
    if not options:
        return None
    layers = options.get("layers")
    if layers is not None and not isinstance(layers, str):
        options["layers"] = list(layers)
    shape = {name: options.pop(name) for name in tuple(options) if name in _SHAPE}
    return {"type": "reft", "reft": {**shape, "hyperparameters": options or "auto"}}


_SHAPE = ("family", "layers", "positions", "rank", "dropout", "tied", "sweep")


def list_jobs(after: str | None, limit: int) -> Call[Page[FineTuningJob]]:
    """GET /v1/fine_tuning/jobs."""
    params = _given({"after": after, "limit": limit})
    return Call("GET", "/v1/fine_tuning/jobs", _reads(Page[FineTuningJob]), params=params)


def get_job(job_id: str) -> Call[FineTuningJob]:
    """GET /v1/fine_tuning/jobs/{id}."""
    return Call("GET", f"/v1/fine_tuning/jobs/{job_id}", _reads(FineTuningJob))


def cancel_job(job_id: str) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs/{id}/cancel."""
    return Call("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel", _reads(FineTuningJob))


def pause_job(job_id: str) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs/{id}/pause."""
    return Call("POST", f"/v1/fine_tuning/jobs/{job_id}/pause", _reads(FineTuningJob))


def resume_job(job_id: str) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs/{id}/resume."""
    return Call("POST", f"/v1/fine_tuning/jobs/{job_id}/resume", _reads(FineTuningJob))


def retry_job(job_id: str) -> Call[FineTuningJob]:
    """POST /v1/fine_tuning/jobs/{id}/retry."""
    return Call("POST", f"/v1/fine_tuning/jobs/{job_id}/retry", _reads(FineTuningJob))


def stream_events(job_id: str, last: str | None, read_timeout_s: float) -> Call[None]:
    """GET /v1/fine_tuning/jobs/{id}/events as a stream, behind the event with id `last`."""
    path = f"/v1/fine_tuning/jobs/{job_id}/events"
    headers = {"Accept": "text/event-stream", **_given({"Last-Event-ID": last})}
    params = {"stream": True}
    return Call("GET", path, lambda _: None, params=params, headers=headers, read_timeout_s=read_timeout_s)


def list_checkpoints(job_id: str) -> Call[list[FineTuningCheckpoint]]:
    """GET /v1/fine_tuning/jobs/{id}/checkpoints."""
    read = _reads(Page[FineTuningCheckpoint])
    return Call("GET", f"/v1/fine_tuning/jobs/{job_id}/checkpoints", lambda response: read(response).data)


# --- Evals


def create_eval(
    file_id: str, criteria: Criteria, *, name: str | None, metadata: Mapping[str, str] | None
) -> Call[Eval]:
    """POST /v1/evals. criteria: each its type, or all of it."""
    body = {
        "name": name,
        "data_source_config": {"type": "file", "file_id": file_id},
        "testing_criteria": [{"type": each} if isinstance(each, str) else dict(each) for each in criteria],
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", "/v1/evals", _reads(Eval), json=_given(body))


def list_evals(after: str | None, limit: int) -> Call[list[Eval]]:
    """GET /v1/evals; newest first."""
    params = _given({"after": after, "limit": limit})
    return Call("GET", "/v1/evals", lambda response: _reads(Page[Eval])(response).data, params=params)


def get_eval(eval_id: str) -> Call[Eval]:
    """GET /v1/evals/{id}."""
    return Call("GET", f"/v1/evals/{eval_id}", _reads(Eval))


def delete_eval(eval_id: str) -> Call[Deleted]:
    """DELETE /v1/evals/{id}."""
    return Call("DELETE", f"/v1/evals/{eval_id}", _reads(Deleted))


def create_eval_run(
    eval_id: str,
    model: str,
    interventions: Interventions | None,
    *,
    name: str | None,
    max_tokens: int | None,
    metadata: Mapping[str, str] | None,
) -> Call[EvalRun]:
    """POST /v1/evals/{id}/runs."""
    source = {
        "type": "completions",
        "model": model,
        "interventions": None if interventions is None else [_use(item) for item in interventions],
        "sampling_params": None if max_tokens is None else {"max_completion_tokens": max_tokens},
    }
    body = {
        "name": name,
        "data_source": _given(source),
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", f"/v1/evals/{eval_id}/runs", _reads(EvalRun), json=_given(body))


def get_eval_run(eval_id: str, run_id: str) -> Call[EvalRun]:
    """GET /v1/evals/{id}/runs/{id}."""
    return Call("GET", f"/v1/evals/{eval_id}/runs/{run_id}", _reads(EvalRun))


def cancel_eval_run(eval_id: str, run_id: str) -> Call[EvalRun]:
    """POST /v1/evals/{id}/runs/{id}/cancel."""
    return Call("POST", f"/v1/evals/{eval_id}/runs/{run_id}/cancel", _reads(EvalRun))


def delete_eval_run(eval_id: str, run_id: str) -> Call[Deleted]:
    """DELETE /v1/evals/{id}/runs/{id}."""
    return Call("DELETE", f"/v1/evals/{eval_id}/runs/{run_id}", _reads(Deleted))


def list_eval_items(
    eval_id: str, run_id: str, *, status: str | None, after: str | None, limit: int
) -> Call[Page[EvalOutputItem]]:
    """GET /v1/evals/{id}/runs/{id}/output_items; in the order of the data set."""
    path = f"/v1/evals/{eval_id}/runs/{run_id}/output_items"
    params = _given({"status": status, "after": after, "limit": limit})
    return Call("GET", path, _reads(Page[EvalOutputItem]), params=params)


# --- Interventions


def list_interventions() -> Call[list[InterventionInfo]]:
    """GET /v1/interventions."""
    return Call("GET", "/v1/interventions", lambda response: _reads(Page[InterventionInfo])(response).data)


def get_intervention(name: str) -> Call[InterventionInfo]:
    """GET /v1/interventions/{name}."""
    return Call("GET", f"/v1/interventions/{name}", _reads(InterventionInfo))


def get_version(name: str, version: int | str) -> Call[InterventionVersion]:
    """GET /v1/interventions/{name}/versions/{version}."""
    return Call("GET", f"/v1/interventions/{name}/versions/{version}", _reads(InterventionVersion))


def get_history(name: str, version: int | str) -> Call[InterventionHistory]:
    """GET /v1/interventions/{name}/versions/{version}/history."""
    return Call("GET", f"/v1/interventions/{name}/versions/{version}/history", _reads(InterventionHistory))


def upload_intervention(name: str, artifact: str | Path) -> Call[InterventionVersion]:
    """POST /v1/interventions. artifact: a folder as `download` writes it, or such a folder zipped."""
    path = Path(artifact)
    upload = Upload(f"{name}.zip", _zipped(path) if path.is_dir() else path)
    return Call("POST", "/v1/interventions", _reads(InterventionVersion), form={"name": name}, upload=upload)


def _zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ARTIFACT_FILES:
            archive.write(folder / name, name)
        if (folder / HISTORY_FILE).exists():
            archive.write(folder / HISTORY_FILE, HISTORY_FILE)
    return buffer.getvalue()


def download_intervention(name: str, version: int | str, folder: str | Path) -> Call[Path]:
    """GET /v1/interventions/{name}/versions/{version}/content, unzipped into a folder that is made if need be."""

    def unzip(response: httpx.Response) -> Path:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            for member in (*ARTIFACT_FILES, *({HISTORY_FILE} & set(archive.namelist()))):
                (target / member).write_bytes(archive.read(member))
        return target

    return Call("GET", f"/v1/interventions/{name}/versions/{version}/content", unzip)


def delete_intervention(name: str, version: int | str | None, *, force: bool) -> Call[Deleted]:
    """DELETE /v1/interventions/{name}, or of one of its versions."""
    path = f"/v1/interventions/{name}" + ("" if version is None else f"/versions/{version}")
    return Call("DELETE", path, _reads(Deleted), params={"force": force})


def set_alias(name: str, alias: str, version: int) -> Call[InterventionInfo]:
    """PUT /v1/interventions/{name}/aliases/{alias}."""
    path = f"/v1/interventions/{name}/aliases/{alias}"
    return Call("PUT", path, _reads(InterventionInfo), json={"version": version})


def delete_alias(name: str, alias: str) -> Call[InterventionInfo]:
    """DELETE /v1/interventions/{name}/aliases/{alias}."""
    return Call("DELETE", f"/v1/interventions/{name}/aliases/{alias}", _reads(InterventionInfo))
