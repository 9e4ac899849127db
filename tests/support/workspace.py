"""A store, the API's jobs and any number of workers in one process, for tests that drive a run step by step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from api_data import chat_lines

from reftserve.client.schemas import FineTuningJobCreate
from reftserve.server.base.folder import Base, open_base
from reftserve.server.base.model import load_model
from reftserve.server.registry.names import Reference
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.leases import Lease, Leases
from reftserve.server.storage.tables import Job, Version
from reftserve.server.training.data_check import DataCheck
from reftserve.server.training.job_files import JobFiles
from reftserve.server.training.job_repository import JobRepository
from reftserve.server.training.job_runner import JobRunner
from reftserve.server.training.job_service import JobService
from reftserve.server.training.varlen import VarlenModel

OWNER = "default"
EXAMPLES = 24
STEPS = 10
CHECKPOINT_STEPS = 4


class Workspace:
    """The state that server and workers of one data folder share. lease_s: how long a silent worker keeps a job."""

    def __init__(self, model_folder: Path, data: Path, *, lease_s: float = 60, **settings: Any) -> None:
        self.settings = Settings(model=str(model_folder), data=data, lease_s=lease_s, **settings)
        self.base: Base = open_base(self.settings)
        self.store: Store = open_store(self.settings, self.base.fingerprint)
        self.jobs = JobService(self.store, self.base, DataCheck(self.settings, self.base))
        self.repository = JobRepository(self.store.database)
        self.varlen = VarlenModel(load_model(self.base.folder, torch.float32, torch.device("cpu")))

    def create(
        self,
        name: str = "tone",
        sweep: dict[str, Any] | None = None,
        positions: str | None = None,
        hyperparameters: dict[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        file = self.store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(chat_lines(EXAMPLES)))
        hyper = {"n_epochs": 2, "batch_size": 4, **(hyperparameters or {})}
        reft: dict[str, Any] = {"layers": [1], "rank": 1, "dropout": 0.1, "hyperparameters": hyper}
        reft |= {} if sweep is None else {"sweep": sweep}
        reft |= {} if positions is None else {"positions": positions}
        body = {"model": self.base.name, "training_file": file.id, "suffix": name, "seed": 7, **fields}
        request = FineTuningJobCreate.model_validate({**body, "method": {"type": "reft", "reft": reft}})
        return self.jobs.create(OWNER, request).id

    def worker(self, name: str = "a", *, base: Base | None = None) -> Worker:
        return Worker(self, name, base or self.base)

    def job(self, job_id: str) -> Job:
        return self.jobs.get(OWNER, job_id)

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.repository.events(job_id, before=None, limit=10**6)][::-1]

    def steps(self, job_id: str) -> list[int]:
        """Return the steps in the order of the events that report them."""
        events = self.repository.events(job_id, before=None, limit=10**6)[::-1]
        metrics = [event.data for event in events if event.data and "step" in event.data]
        return [step["step"] for data in metrics for step in (*data.get("earlier", []), data)]

    def published(self, name: str) -> list[int]:
        rows, _ = self.store.interventions.list_page(OWNER)
        return [version for row in rows if row.name == name for version in row.versions]

    def content_hash(self, name: str) -> str:
        return self.first_version(name).content_hash

    def first_version(self, name: str) -> Version:
        registry = self.store.interventions
        return registry.find(OWNER, Reference(name, registry.get(OWNER, name).versions[0])).row

    def kept(self) -> list[str]:
        return [key.rsplit("/", 1)[-1] for key in self.store.blobs.children("jobs")]


class Worker:
    def __init__(self, workspace: Workspace, name: str, base: Base) -> None:
        settings = workspace.settings
        self.leases = Leases(workspace.store.database, Job, name, lease_s=settings.lease_s)
        self.files = JobFiles(
            workspace.store.blobs,
            workspace.repository,
            self.leases,
            max_bytes=settings.max_jobs_bytes,
            keep_s=settings.keep_jobs_s,
        )
        self.runs = JobRunner(
            workspace.store,
            base,
            workspace.varlen,
            self.files,
            checkpoint_steps=CHECKPOINT_STEPS,
            activation_cache_bytes=settings.activation_cache_bytes,
            activation_cache_disk_bytes=settings.activation_cache_disk_bytes,
            scratch=settings.data,
        )

    def take(self) -> Lease:
        lease = self.leases.take()
        assert lease is not None, "no job to take"
        return lease

    def work(self) -> None:
        self.runs.execute(self.take())
