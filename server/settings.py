"""The one settings object: every field with its unit and its reason; no other module of the server reads `REFTSERVE_*`.

Sources in rising precedence: the environment (`REFTSERVE_*`), a TOML file (`REFTSERVE_CONFIG` or `--config`), the
command line. Child processes (engine, worker) get the resolved object as JSON, never the sources.

`server/settings_reference.py` makes the flags of the command line and `docs/settings.md` from these fields, so a
description stands here once. Names end with their unit: `_bytes`, `_s`.
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
HEARTBEAT_S = 1.0  # between two signs of life of a training worker
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENV_PREFIX = "REFTSERVE_"
# Variables with our prefix that are no settings: two of the client's and one of the tests'.
OTHER_VARIABLES = frozenset({"REFTSERVE_URL", "REFTSERVE_API_KEY", "REFTSERVE_TEST_MODEL"})


class SettingsError(ValueError):
    """A setting is unknown, or a settings file cannot be read."""


@dataclass(frozen=True)
class Unset:
    """In the annotation of a setting whose default is None: what the server uses then."""

    meaning: str


_SIZE = TypeAdapter(ByteSize)


def _parse_size(value: object) -> int:
    try:
        return int(_SIZE.validate_python(value))
    except ValidationError as cause:
        raise ValueError(f"{value!r} is no size; write bytes, or a unit: 1073741824, 512MiB, 2GiB") from cause


Bytes = Annotated[int, BeforeValidator(_parse_size)]


class ServerSettings(BaseModel):
    """Where the server listens and where it keeps its data."""

    model_config = ConfigDict(frozen=True)

    config: Annotated[Path | None, Unset("none")] = Field(None, description="TOML file with any of these settings")
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. The default admits this machine only; 0.0.0.0 admits every network, and "
        "the server does not authenticate anybody",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    data: Path = Field(
        Path("reftserve-data"), description="Folder for the database, artifacts, uploaded files and models"
    )
    database_url: Annotated[str | None, Unset("SQLite in the data folder")] = Field(
        None, description="SQLAlchemy URL of the database; PostgreSQL when several machines share it"
    )
    blob_url: Annotated[str | None, Unset("the data folder")] = Field(
        None, description="fsspec URL for files and artifacts, such as s3://bucket/prefix"
    )
    worker: bool = Field(
        True, description="Start a training worker and keep it running; without it, run `reftserve worker`"
    )


class BaseModelSettings(BaseModel):
    """Which base model the process serves, where it computes, and in which numbers."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(DEFAULT_MODEL, description="Hugging Face id, or a folder with a model in that format")
    served_model_name: Annotated[str | None, Unset("the id, or the folder's name")] = Field(
        None, description="Name of the base model in the API"
    )
    device: str = Field("auto", description="Where to compute: cpu, cuda, or auto, which takes CUDA where it is found")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Numbers to compute in; auto is float32 on the CPU and bfloat16 on CUDA"
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 computes linear layers in 8 bits, faster and a little less exact; it needs the CPU's kernels",
    )
    cpu_kernels: Literal["auto", "always", "never"] = Field(
        "auto",
        description="On the CPU in float32, kernels that a C++ compiler builds at the first start. auto takes each "
        "kernel that is faster than torch's operations, measured then; without a compiler, none, with a warning. "
        "always takes all, never takes none. int8 needs them",
    )
    cuda_graphs: bool = Field(
        True,
        description="On CUDA, record decode steps once and replay them; otherwise small models wait for Python",
    )
    override_fingerprint: bool = Field(
        False,
        description="Accept interventions of a base with other weights, another tokenizer or another chat template. "
        "Another architecture or other sizes are always refused",
    )


class EngineSettings(BaseModel):
    """How much memory the engine takes and how it fills a step."""

    model_config = ConfigDict(frozen=True)

    engine_threads: Annotated[int | None, Unset("one for each core")] = Field(
        None, ge=1, description="CPU threads of the engine"
    )
    kv_cache_bytes: Bytes = Field(
        1 << 30, gt=0, description="Memory for the keys and values of all layers. Bounds the tokens in flight"
    )
    block_size: int = Field(32, ge=1, description="Tokens in a block of the KV cache, the unit that requests share")
    prefix_cache: bool = Field(True, description="Keep the keys and values of prompts for prompts that begin alike")
    max_batch_tokens: int = Field(
        512, ge=1, description="Tokens that one step computes at most; a longer prompt is read in chunks"
    )
    max_sequences: int = Field(64, ge=1, description="Answers that the engine generates at once; others wait")
    bank_bytes: Bytes = Field(256 << 20, gt=0, description="Device memory for hot interventions")
    host_bytes: Bytes = Field(
        1 << 30,
        gt=0,
        description="Host memory for interventions that were read from disk. Those of queued requests come on top",
    )


class TrainingSettings(BaseModel):
    """What training may take from the machine, and how long its state is kept."""

    model_config = ConfigDict(frozen=True)

    worker_threads: Annotated[int | None, Unset("one for each core")] = Field(
        None, ge=1, description="CPU threads of a training worker"
    )
    worker_yields: bool = Field(
        True,
        description="Training takes fewer CPU threads while cores are busy, which may round sums in another order. "
        "Without it, a job's result is the same to the bit whatever else the machine does",
    )
    worker_niceness: int = Field(
        8, ge=0, le=19, description="CPU priority of training: 0 is the engine's, 19 is the lowest"
    )
    activation_cache_bytes: Bytes = Field(
        1 << 30, ge=0, description="Memory of a job for activations that its steps share"
    )
    activation_cache_disk_bytes: Bytes = Field(
        4 << 30, ge=0, description="Disk of a job for activations that find no room in that memory"
    )
    checkpoint_steps: int = Field(10, ge=1, description="Optimizer steps between durable checkpoints of a job")
    lease_s: float = Field(
        10.0, gt=0, description="Time without a sign of life after which another worker takes over a job"
    )
    keep_jobs_s: float = Field(
        7 * 86400.0, ge=0, description="Time in which a failed or cancelled job can be retried from its checkpoint"
    )


class LimitSettings(BaseModel):
    """What a request, an upload and an owner may take."""

    model_config = ConfigDict(frozen=True)

    max_queue: int = Field(1024, ge=1, description="Answers that wait or run; a request for more gets status 429")
    max_stop_strings: int = Field(16, ge=1, description="Stop strings of a request")
    max_interventions: int = Field(8, ge=1, description="Interventions that one request composes")
    max_file_bytes: Bytes = Field(512 << 20, gt=0, description="Size of an uploaded data set; more gets status 413")
    max_artifact_bytes: Bytes = Field(
        256 << 20, gt=0, description="Size of an uploaded intervention; more gets status 413"
    )
    max_owner_bytes: Bytes = Field(
        16 << 30, gt=0, description="Uploaded files of one owner together; more gets status 413"
    )
    max_owner_interventions_bytes: Bytes = Field(
        16 << 30, gt=0, description="Published interventions of one owner together; more gets status 413"
    )
    max_jobs_bytes: Bytes = Field(
        64 << 30,
        gt=0,
        description="Data copies and checkpoints of all jobs together; past it, those of ended jobs go first",
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
        """Return flags over TOML over environment; a child process is given every field, and reads no source."""
        given = init_settings()
        if given.keys() >= settings_cls.model_fields.keys():
            return (init_settings,)
        named = given.get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        toml = (TomlConfigSettingsSource(settings_cls, _readable(Path(named))),) if named else ()
        return (init_settings, *toml, env_settings)

    @classmethod
    def from_flags(cls, **flags: Any) -> Settings:
        """Read settings from all sources; a flag of None was not given.

        Raises SettingsError for an unknown name or an unreadable file, ValidationError for a value out of range.
        """
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
        """SQLAlchemy URL of the tables."""
        return self.database_url or f"sqlite:///{self.data.resolve() / 'reftserve.db'}"

    @property
    def weights_folder(self) -> Path:
        """Where the file of the base's weights is that all processes map on the CPU."""
        return self.data.resolve() / "weights"

    @property
    def heartbeat_file(self) -> Path:
        """The file that workers on this data folder touch."""
        return self.data / "worker.heartbeat"

    @property
    def resolved_blob_url(self) -> str:
        """Fsspec URL below which files and artifacts are kept."""
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
    """Return the variables that have our prefix and no meaning, in any case: pydantic-settings ignores case."""
    settings = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    ours = (name for name in environment if name.upper().startswith(ENV_PREFIX))
    return sorted(name for name in ours if name.upper() not in settings | OTHER_VARIABLES)


def _refuse_unknown(names: list[str], *, prefix: str = "") -> None:
    """Raise SettingsError when there are any; near names are looked for behind the prefix, which all names share."""
    sentences = []
    for name in names:
        near = process.extract(name[len(prefix) :].lower(), sorted(Settings.model_fields), limit=2, score_cutoff=75)
        known = [prefix + (field.upper() if prefix else field) for field, _, _ in near]
        sentences.append(f"{name} is no setting" + (f"; did you mean {' or '.join(known)}?" if known else ""))
    if sentences:
        raise SettingsError(". ".join(sentences))


def _readable(file: Path) -> Path:
    """Return the file; pydantic-settings would pass over one that is missing.

    Raises SettingsError when it cannot be read or is no TOML.
    """
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as cause:
        raise SettingsError(f"settings file {file}: {cause.strerror}") from cause
    except ValueError as cause:
        raise SettingsError(f"settings file {file} is no TOML: {cause}") from cause
    return file
