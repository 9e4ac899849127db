"""The one settings object: every field with its unit and reason; no other module reads the environment.

Sources in rising precedence: environment (`REFTSERVE_*`), a TOML file (`REFTSERVE_CONFIG` or `--config`),
command-line flags. Child processes (engine, worker) get the resolved object as JSON, never the sources.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
HEARTBEAT_S = 1.0  # between two signs of life of a training worker
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Settings(BaseSettings):
    """Immutable settings of one server."""

    model_config = SettingsConfigDict(env_prefix="REFTSERVE_", frozen=True, extra="forbid")

    config: Path | None = Field(None, description="TOML file with any of these fields")
    model: str = Field(DEFAULT_MODEL, description="Hugging Face id, or a folder with a model in its format")
    served_model_name: str | None = Field(None, description="Name in /v1/models; default: the id or folder name")
    data: Path = Field(Path("reftserve-data"), description="Folder for database, artifacts, files and models")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: SQLite in the data folder")
    blob_url: str | None = Field(None, description="fsspec URL for files and artifacts; default: the data folder")
    worker: bool = Field(True, description="Start and supervise a training worker beside the server")

    device: str = Field("auto", description="auto: cuda when there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on the CPU, bfloat16 on CUDA"
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: linear layers in 8 bits, on the CPU; faster, a little less exact"
    )
    cpu_kernels: Literal["auto", "always", "never"] = Field(
        "auto",
        description="On the CPU, in float32: kernels that a C++ compiler makes once. auto: each kernel that is faster "
        "than torch's operations, measured at the first start; without a compiler torch's alone, and a warning. "
        "always: all of them. never: torch's alone. int8 needs them",
    )
    cuda_graphs: bool = Field(
        True, description="On CUDA: record decode steps once and replay them; without, small models wait for Python"
    )
    engine_threads: int | None = Field(None, ge=1, description="CPU threads of the engine; default: all cores")
    worker_threads: int | None = Field(None, ge=1, description="CPU threads of training; default: all cores")
    worker_yields: bool = Field(
        True,
        description="Training takes fewer CPU threads while cores are busy. Without, a job's result is the same to the "
        "bit whatever else the machine does; with it, sums may be rounded in another order",
    )
    worker_niceness: int = Field(
        8, ge=0, le=19, description="Priority of training on busy CPUs: 0 is the engine's own, 19 all but waits for it"
    )
    kv_cache_bytes: int = Field(1 << 30, gt=0, description="Memory for keys and values, all layers together")
    block_size: int = Field(32, ge=1, description="Tokens per block of the KV cache")
    max_batch_tokens: int = Field(512, ge=1, description="Token budget of one step: longer prompts are chunked")
    max_sequences: int = Field(64, ge=1, description="Sequences running at once")
    max_queue: int = Field(1024, ge=1, description="Requests waiting; past it 429")
    bank_bytes: int = Field(256 << 20, gt=0, description="Device memory for hot interventions")
    host_bytes: int = Field(
        1 << 30,
        gt=0,
        description="Memory for interventions read from disk; those that queued requests hold come on top",
    )
    prefix_cache: bool = Field(True, description="Keep the keys and values of prompts for later ones that begin alike")
    max_stop_strings: int = Field(16, ge=1, description="Stop strings per request")
    max_interventions: int = Field(8, ge=1, description="Interventions composed in one request")

    max_file_bytes: int = Field(512 << 20, gt=0, description="Size limit of one upload")
    max_owner_bytes: int = Field(16 << 30, gt=0, description="Uploaded files of one owner in all; past it 413")
    max_jobs_bytes: int = Field(
        64 << 30, gt=0, description="Data copies and checkpoints of all jobs; past it those of ended jobs go first"
    )
    max_owner_interventions_bytes: int = Field(
        16 << 30, gt=0, description="Published interventions of one owner in all; past it 413"
    )
    max_artifact_bytes: int = Field(256 << 20, gt=0, description="Size limit of one uploaded intervention")
    override_fingerprint: bool = Field(
        False,
        description="Accept interventions whose weights, tokenizer or template hash differs from the base's",
    )
    activation_cache_bytes: int = Field(
        1 << 30, ge=0, description="Memory of a training job for activations that its steps share"
    )
    activation_cache_disk_bytes: int = Field(
        4 << 30, ge=0, description="Disk for activations that find no room in that memory"
    )
    checkpoint_steps: int = Field(10, ge=1, description="Optimizer steps between durable checkpoints of a job")
    lease_s: float = Field(
        10.0, gt=0, description="Seconds without a sign of life after which a worker's job goes to another worker"
    )
    keep_jobs_s: float = Field(
        7 * 86400.0, ge=0, description="Seconds that a failed or cancelled job can be retried from its checkpoint"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags over TOML over environment."""
        named = init_settings().get("config") or os.environ.get("REFTSERVE_CONFIG")
        toml = (TomlConfigSettingsSource(settings_cls, Path(named)),) if named else ()
        return (init_settings, *toml, env_settings)

    @classmethod
    def from_flags(cls, **flags: Any) -> Settings:
        """Settings with command-line flags on top; a flag of None was not given."""
        return cls(**{name: value for name, value in flags.items() if value is not None})

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
