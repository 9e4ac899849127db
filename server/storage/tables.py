"""The database schema. Every row carries its owner, names are unique within an owner, times are Unix seconds."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, Double, ForeignKey, Index, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Table(DeclarativeBase):
    """Base of all tables. Migrations need the predictable names of its constraints."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[str]: JSON}


class Leased:
    """Columns of a row that one process works on at a time (`leases.py`). attempts: leases since its last progress.

    ALIVE: statuses of rows that a process may take. Taking a `queued` row makes it RUNNING.
    """

    RUNNING: ClassVar[str]
    ALIVE: ClassVar[tuple[str, ...]]
    ENDED: ClassVar[tuple[str, ...]]

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(index=True)
    lease_worker: Mapped[str | None] = mapped_column(index=True)
    lease_expires_at: Mapped[float | None] = mapped_column(Double)
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int]
    started_at: Mapped[int | None]


class Identity(Table):
    """The database's id, the only row; the store of its blobs carries the same (`store_identity.py`)."""

    __tablename__ = "identity"

    id: Mapped[str] = mapped_column(primary_key=True)


class File(Table):
    """An uploaded file or a job's result. blob_key: blob of its bytes; examples: their number in a data set."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_owner_created_at_id", "owner", "created_at", "id"),
        Index("ix_files_owner_purpose_created_at_id", "owner", "purpose", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str]
    blob_key: Mapped[str]
    examples: Mapped[int | None]
    created_at: Mapped[int]


class Intervention(Table):
    """An intervention's name. next_version only grows, so a version number is never used twice."""

    __tablename__ = "interventions"
    __table_args__ = (UniqueConstraint("owner", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    next_version: Mapped[int]
    created_at: Mapped[int]

    versions: Mapped[list[Version]] = relationship(order_by="Version.version")
    aliases: Mapped[list[Alias]] = relationship(order_by="Alias.alias")


class Version(Table):
    """A published version. blob_key: folder of its artifact; job_id: the job that trained it, which publishes once.

    file_hashes: SHA-256 of each of the artifact's files, by name; None in rows older than the column.
    """

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("intervention_id", "version"), UniqueConstraint("job_id"))

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    intervention_id: Mapped[int] = mapped_column(ForeignKey("interventions.id"))
    version: Mapped[int]
    content_hash: Mapped[str]
    bytes: Mapped[int]
    parameters: Mapped[int]
    manifest: Mapped[dict[str, Any]]
    file_hashes: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    blob_key: Mapped[str]
    job_id: Mapped[str | None]
    created_at: Mapped[int]


class Alias(Table):
    """A movable name of a version, `latest` included."""

    __tablename__ = "aliases"

    intervention_id: Mapped[int] = mapped_column(ForeignKey("interventions.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    version: Mapped[int]


class Job(Leased, Table):
    """A training run. base: fingerprint of its model.

    plan ({} before), data_report and data: made by the job's first step, which checks and encodes its files. plan: the
    recipe's decisions. data: where the encoded files are (`job_data.py`).
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_owner_created_at_id", "owner", "created_at", "id"),)
    VALIDATING = "validating_files"
    RUNNING = "running"
    ALIVE = (VALIDATING, "queued", RUNNING)
    ENDED = ("succeeded", "failed", "cancelled")

    owner: Mapped[str]
    model: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    suffix: Mapped[str]
    method: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    plan: Mapped[dict[str, Any]]
    data_report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    seed: Mapped[int]
    job_metadata: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    base: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None]
    result_files: Mapped[list[str]]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    estimated_finish: Mapped[int | None]
    finished_at: Mapped[int | None]


class JobEvent(Table):
    """An event of a job. number: counts up without gaps within the job."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[int]


class JobCheckpoint(Table):
    """A durable step of a job. path: blob folder of its state, which exists while it is `kept`.

    files: SHA-256 of each file by its name; None in rows that are older than the column.
    """

    __tablename__ = "job_checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    path: Mapped[str]
    kept: Mapped[bool] = mapped_column(default=True)
    files: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[int]


class Eval(Table):
    """A data set and its criteria, whose names and labels are filled in."""

    __tablename__ = "evals"
    __table_args__ = (Index("ix_evals_owner_id", "owner", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    file_id: Mapped[str]
    criteria: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    eval_metadata: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[int]

    runs: Mapped[list[EvalRun]] = relationship(
        order_by="EvalRun.id", cascade="all, delete-orphan", passive_deletes=True
    )


class EvalRun(Leased, Table):
    """A run of an eval. uses: name, version and scale of interventions. served: fingerprint of base and engine."""

    __tablename__ = "eval_runs"
    RUNNING = "in_progress"
    ALIVE = ("queued", RUNNING)
    ENDED = ("completed", "failed", "canceled")

    owner: Mapped[str]
    eval_id: Mapped[str] = mapped_column(ForeignKey("evals.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    data_source: Mapped[dict[str, Any]]
    uses: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    served: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    total: Mapped[int]
    tally: Mapped[dict[str, Any]]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    run_metadata: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    finished_at: Mapped[int | None]


class EvalItem(Table):
    """One example of a run. number: its index in the data set, from 0; error: why it has no results."""

    __tablename__ = "eval_items"

    run_id: Mapped[str] = mapped_column(ForeignKey("eval_runs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    status: Mapped[str]
    output: Mapped[str | None]
    results: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[int]
