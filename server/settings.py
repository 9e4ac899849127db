"""The settings of a server; no other module of the server reads `REFTSERVE_*`.

Sources in rising precedence: the environment (`REFTSERVE_*`), a TOML file (`REFTSERVE_CONFIG` or `--config`), flags.
The engine and the worker get resolved values as JSON, never the sources. Names end with their unit: `_bytes`, `_s`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from rapidfuzz import process

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
HEARTBEAT_S = 1.0  # a training worker's interval between heartbeats
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENV_PREFIX = "REFTSERVE_"
# Variables with our prefix that are not settings: two are the client's, one is the tests'.
OTHER_VARIABLES = frozenset({"REFTSERVE_URL", "REFTSERVE_API_KEY", "REFTSERVE_TEST_MODEL"})


class SettingsError(ValueError):
    """A setting is unknown, or a settings file cannot be read."""


@dataclass(frozen=True)
class Unset:
    """Annotates a setting whose default is None with the value that the server then uses."""

    meaning: str


_SIZE = TypeAdapter(ByteSize)


def _parse_size(value: object) -> int:
    try:
        return int(_SIZE.validate_python(value))
    except ValidationError as cause:
        raise ValueError(f"{value!r} is not a size; write bytes, or use a unit: 1073741824, 512MiB, 2GiB") from cause


Bytes = Annotated[int, BeforeValidator(_parse_size)]


SpecialTokensInText = Literal["text", "control"]


class ServerSettings(BaseModel):
    """The address of the server and the places of its data."""

    model_config = ConfigDict(frozen=True)

    config: Annotated[Path | None, Unset("none")] = Field(None, description="TOML file with any of these settings")
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. The default admits this machine only; 0.0.0.0 admits every network, and "
        "the server has no authentication",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    data: Path = Field(
        Path("reftserve-data"), description="Folder of the database, artifacts, uploaded files and models"
    )
    database_url: Annotated[str | None, Unset("SQLite in the data folder")] = Field(
        None, description="SQLAlchemy URL of the database; use PostgreSQL if several machines share it"
    )
    blob_url: Annotated[str | None, Unset("the data folder")] = Field(
        None, description="fsspec URL of files and artifacts, such as s3://bucket/prefix"
    )
    worker: bool = Field(
        True, description="Start a training worker and keep it running; without it, run `reftserve worker`"
    )


class BaseModelSettings(BaseModel):
    """The base model, its device and its number formats."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(DEFAULT_MODEL, description="Hugging Face id, or a folder with a model in Hugging Face's format")
    served_model_name: Annotated[str | None, Unset("the id, or the folder's name")] = Field(
        None, description="Name of the base model in the API"
    )
    device: str = Field("auto", description="Device to compute on: cpu, cuda, or auto, which uses CUDA if available")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format to compute in; auto is float32 on the CPU and bfloat16 on CUDA"
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 computes linear layers in 8 bits: faster and slightly less exact. It needs the CPU kernels",
    )
    cpu_kernels: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Use of our C++ kernels on the CPU, which the first start compiles. auto uses each kernel that is "
        "as fast as torch's operations, as measured at the first start; without a compiler it warns and uses none. "
        "always uses all, never uses none. int8 needs them",
    )
    cuda_graphs: bool = Field(
        True,
        description="On CUDA, record decode steps once and replay them; otherwise Python slows small models down",
    )
    override_fingerprint: bool = Field(
        False,
        description="Accept interventions for a base with other weights, another tokenizer or another chat template. "
        "A different architecture or size is always refused",
    )
    special_tokens_in_text: SpecialTokensInText = Field(
        "text",
        description="What a special token such as <|im_end|> is where a chat message, an answer or a label spells it. "
        "text: its characters, so that no message ends a turn or forges one. control: the token itself. Plain prompts "
        "always keep control tokens",
    )


class EngineSettings(BaseModel):
    """The memory of the engine and the size of its steps."""

    model_config = ConfigDict(frozen=True)

    engine_threads: Annotated[int | None, Unset("one for each core")] = Field(
        None, ge=1, description="CPU threads of the engine"
    )
    kv_cache_bytes: Bytes = Field(
        1 << 30,
        gt=0,
        description="Memory for the keys and values of all layers. It limits the tokens of running requests",
    )
    block_size: int = Field(32, ge=1, description="Tokens in a block of the KV cache; requests share whole blocks")
    prefix_cache: bool = Field(True, description="Reuse cached keys and values for prompts with the same beginning")
    max_batch_tokens: int = Field(
        512, ge=1, description="Largest number of tokens in a step; a longer prompt is read in chunks"
    )
    max_sequences: int = Field(
        64, ge=1, description="Largest number of answers generated at the same time; others wait"
    )
    bank_bytes: Bytes = Field(256 << 20, gt=0, description="Device memory for hot interventions")
    host_bytes: Bytes = Field(
        1 << 30,
        gt=0,
        description="Host memory for interventions read from disk. Those of queued requests come on top",
    )


class TrainingSettings(BaseModel):
    """The resources of training, and how long its state is kept."""

    model_config = ConfigDict(frozen=True)

    worker_threads: Annotated[int | None, Unset("one for each core")] = Field(
        None, ge=1, description="CPU threads of a training worker"
    )
    worker_yields: bool = Field(
        True,
        description="Train on fewer CPU threads while other processes use the cores, which may change the rounding of "
        "sums. Without it, a job's result is the same to the bit under any load",
    )
    worker_niceness: int = Field(
        8, ge=0, le=19, description="CPU priority of training: 0 is the engine's, 19 is the lowest"
    )
    activation_cache_bytes: Bytes = Field(
        1 << 30, ge=0, description="A job's memory for activations that its steps share"
    )
    activation_cache_disk_bytes: Bytes = Field(
        4 << 30, ge=0, description="A job's disk space for activations beyond activation_cache_bytes"
    )
    checkpoint_steps: int = Field(10, ge=1, description="Optimizer steps between durable checkpoints of a job")
    lease_s: float = Field(
        10.0, gt=0, description="Another worker takes over a job after this time without a heartbeat"
    )
    keep_jobs_s: float = Field(
        7 * 86400.0, ge=0, description="A failed or cancelled job can be retried from its checkpoint for this time"
    )


class LimitSettings(BaseModel):
    """Limits of requests, uploads and owners."""

    model_config = ConfigDict(frozen=True)

    max_queue: int = Field(
        1024, ge=1, description="Largest number of answers that wait or run; a request above it gets status 429"
    )
    max_stop_strings: int = Field(16, ge=1, description="Largest number of stop strings in a request")
    max_interventions: int = Field(8, ge=1, description="Largest number of interventions in a request")
    max_file_bytes: Bytes = Field(
        512 << 20, gt=0, description="Largest uploaded data set; a larger one gets status 413"
    )
    max_artifact_bytes: Bytes = Field(
        256 << 20, gt=0, description="Largest uploaded intervention; a larger one gets status 413"
    )
    max_owner_bytes: Bytes = Field(
        16 << 30, gt=0, description="Total size of an owner's uploaded files; an upload above it gets status 413"
    )
    max_owner_interventions_bytes: Bytes = Field(
        16 << 30, gt=0, description="Total size of an owner's interventions; publishing above it gets status 413"
    )
    max_jobs_bytes: Bytes = Field(
        64 << 30,
        gt=0,
        description="Total size of data copies and checkpoints of all jobs. Above it, files of ended jobs are deleted",
    )


class Settings(ServerSettings, BaseModelSettings, EngineSettings, TrainingSettings, LimitSettings, BaseSettings):
    """Immutable settings of one server."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources: flags, TOML file, environment. A child process gets every field and reads no source."""
        given = init_settings()
        if given.keys() >= settings_cls.model_fields.keys():
            return (init_settings,)
        named = given.get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        toml = (TomlConfigSettingsSource(settings_cls, _readable(Path(named))),) if named else ()
        return (init_settings, *toml, env_settings)

    @classmethod
    def from_flags(cls, **flags: Any) -> Settings:
        """Read all sources; a flag of None is not given. Raises SettingsError (name, file), ValidationError (value)."""
        _refuse_unknown(unknown_variables(os.environ), prefix=ENV_PREFIX)
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as cause:
            unknown = [str(e["loc"][0]) for e in cause.errors() if e["type"] == "extra_forbidden"]
            _refuse_unknown(unknown)
            raise

    @property
    def resolved_database_url(self) -> str:
        """The SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{self.data.resolve() / 'reftserve.db'}"

    @property
    def weights_folder(self) -> Path:
        """The folder of the weights file that all processes map on the CPU."""
        return self.data.resolve() / "weights"

    @property
    def heartbeat_file(self) -> Path:
        """The file that workers on this data folder touch."""
        return self.data / "worker.heartbeat"

    @property
    def resolved_blob_url(self) -> str:
        """The fsspec URL of the folder of files and artifacts."""
        return self.blob_url or str(self.data.resolve() / "blobs")


# The sections of docs/settings.md and the panels of `--help`, in their order.
GROUPS: dict[str, type[BaseModel]] = {
    "Server": ServerSettings,
    "Base model": BaseModelSettings,
    "Engine": EngineSettings,
    "Training": TrainingSettings,
    "Limits": LimitSettings,
}


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables with our prefix that name no setting. Like pydantic-settings, this ignores case."""
    settings = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    ours = (name for name in environment if name.upper().startswith(ENV_PREFIX))
    return sorted(name for name in ours if name.upper() not in settings | OTHER_VARIABLES)


def _refuse_unknown(names: list[str], *, prefix: str = "") -> None:
    sentences = []
    for name in names:
        near = process.extract(name[len(prefix) :].lower(), sorted(Settings.model_fields), limit=2, score_cutoff=75)
        known = [prefix + (field.upper() if prefix else field) for field, _, _ in near]
        sentences.append(f"{name} is not a setting" + (f"; did you mean {' or '.join(known)}?" if known else ""))
    if sentences:
        raise SettingsError(". ".join(sentences))


def _readable(file: Path) -> Path:
    """Return the file, or raise SettingsError unless it is readable TOML; pydantic-settings ignores a missing file."""
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as cause:
        raise SettingsError(f"settings file {file}: {cause.strerror}") from cause
    except ValueError as cause:
        raise SettingsError(f"settings file {file} is not valid TOML: {cause}") from cause
    return file
