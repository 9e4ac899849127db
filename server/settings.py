"""The settings of a server; no other module of the server reads `REFTSERVE_*`.

Sources in rising precedence: a TOML file (`REFTSERVE_CONFIG` or `--config`), the environment (`REFTSERVE_*`), flags.
An empty variable, and one that Kubernetes sets for a service called `reftserve`, is not given.
The engine and the worker get resolved values as JSON, never the sources. Names end with their unit: `_bytes`, `_s`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as UnreadableSource

from reftserve.server.settings_sources import (
    ENV_PREFIX,
    SettingsError,
    expand_home,
    readable_toml,
    refusal,
    refuse_unknown,
    service_links,
    unknown_variables,
)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
HEARTBEAT_S = 1.0  # a training worker's interval between heartbeats
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Unset:
    """Annotates a setting whose default is None with the value that the server then uses."""

    meaning: str


_SIZE = TypeAdapter(ByteSize)


def _parse_size(value: object) -> int:
    try:
        return int(_SIZE.validate_python(value))
    except ValidationError as cause:
        raise ValueError("this is not a size; write bytes, or use a unit: 1073741824, 512MiB, 2GiB") from cause


Bytes = Annotated[int, BeforeValidator(_parse_size)]


def _expand_model(model: str) -> str:
    return str(expand_home(Path(model))) if model.startswith("~") else model


def _expand_database(url: str | None) -> str | None:
    scheme, home, path = (url or "").partition(":///~")
    return f"{scheme}:///{expand_home(Path(f'~{path}'))}" if home else url


LocalPath = Annotated[Path, AfterValidator(expand_home)]
SpecialTokensInText = Literal["text", "control"]


class ServerSettings(BaseModel):
    """The address of the server and the places of its data."""

    model_config = ConfigDict(frozen=True)

    config: Annotated[LocalPath | None, Unset("none")] = Field(None, description="TOML file with any of these settings")
    host: Annotated[str, AfterValidator(lambda host: host.strip("[]"))] = Field(
        "127.0.0.1",
        description="Address to listen on. The default admits this machine only; 0.0.0.0 admits every network, and "
        "the server has no authentication",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    root_path: Annotated[str, Unset("none")] = Field(
        "",
        pattern=r"^(/[^/\s]+)*$",
        description="Prefix under which a reverse proxy shows the server, such as /llm; the proxy may strip it or not",
    )
    allowed_hosts: Annotated[str, Unset("any name; on a loopback address only its own")] = Field(
        "",
        description="Names that requests may use for this server, separated by commas; * allows any. On a loopback "
        "address the default refuses others, so that no web page can reach the server through a name of its own",
    )
    cors_origins: Annotated[str, Unset("none")] = Field(
        "",
        description="Origins of web pages whose scripts may call the server, separated by commas; * allows any",
    )
    header_timeout_s: float = Field(
        30.0, gt=0, description="A connection that has not sent a whole request header after this time is closed"
    )
    data: LocalPath = Field(
        Path("reftserve-data"), description="Folder of the database, artifacts, uploaded files and models"
    )
    database_url: Annotated[str | None, AfterValidator(_expand_database), Unset("SQLite in the data folder")] = Field(
        None, description="SQLAlchemy URL of the database; use PostgreSQL if several machines share it"
    )
    blob_url: Annotated[str | None, Unset("the data folder")] = Field(
        None, description="fsspec URL of files and artifacts, such as s3://bucket/prefix"
    )
    blob_cache_bytes: Bytes = Field(
        16 << 30,
        gt=0,
        description="Disk space in the data folder for local copies of remote files and artifacts. The least recently "
        "used copies go first",
    )
    reserve_bytes: Bytes = Field(
        8 << 20,
        ge=0,
        description="Disk space that is kept back beside an SQLite database, so that deleting works on a full disk",
    )
    keep_trash_s: float = Field(
        7 * 86400.0,
        ge=0,
        description="Files and artifacts that no row of the database names go to a trash below the store for this time",
    )
    worker: bool = Field(
        True, description="Start a training worker and keep it running; without it, run `reftserve worker`"
    )


class BaseModelSettings(BaseModel):
    """The base model, its device and its number formats."""

    model_config = ConfigDict(frozen=True)

    model: Annotated[str, AfterValidator(_expand_model)] = Field(
        DEFAULT_MODEL, description="Hugging Face id, or a folder with a model in Hugging Face's format"
    )
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

    max_json_bytes: Bytes = Field(
        4 << 20,
        gt=0,
        description="Largest body of a request that uploads no file, unpacked; a larger one gets status 413. A body is "
        "held in memory and takes turns with others above 64 KiB",
    )
    max_queue: int = Field(
        1024, ge=1, description="Largest number of answers that wait or run; a request above it gets status 429"
    )
    max_wait_s: float = Field(
        10.0,
        gt=0,
        description="Longest expected wait for a first token, seconds; a longer one gets status 429",
    )
    shutdown_grace_s: float = Field(
        20.0,
        ge=0,
        description="How long answers may go on after SIGTERM before they end with an error, seconds",
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

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources: flags, environment, TOML file. A child process gets every field and reads no source."""
        given = init_settings()
        if given.keys() >= settings_cls.model_fields.keys():
            return (init_settings,)
        links = {name.upper() for name in service_links(os.environ)}
        variables = {name: value for name, value in env_settings().items() if ENV_PREFIX + name.upper() not in links}
        named = given.get("config") or variables.get("config")
        toml = (TomlConfigSettingsSource(settings_cls, readable_toml(Path(named))),) if named else ()
        return (init_settings, InitSettingsSource(settings_cls, variables), *toml)

    @classmethod
    def from_flags(cls, **flags: Any) -> Settings:
        """Read all sources; a flag of None is not given. Raises SettingsError, which names flag, variable or file."""
        fields = cls.model_fields
        refuse_unknown(unknown_variables(os.environ, fields), fields, prefix=ENV_PREFIX)
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as cause:
            errors = cause.errors(include_url=False)
            refuse_unknown([str(e["loc"][0]) for e in errors if e["type"] == "extra_forbidden"], fields)
            raise SettingsError("; ".join(refusal(error, given) for error in errors)) from cause
        except UnreadableSource as cause:  # a list or object that is not JSON
            raise SettingsError(str(cause)) from cause

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
