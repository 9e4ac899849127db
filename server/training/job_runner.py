"""The job runner carries one job from its lease to its end. After a crash, every step can be repeated."""

from __future__ import annotations

import csv
import io
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.orm import Session

from reftserve.interventions import (
    BaseFingerprint,
    FingerprintMismatch,
    History,
    PlacedEdit,
    Provenance,
    save_artifact,
)
from reftserve.server.base.folder import Base
from reftserve.server.base.memory import trim_heap
from reftserve.server.datasets import Splits
from reftserve.server.errors import Conflict, ServerError, StorageFull
from reftserve.server.registry.store import Store
from reftserve.server.storage.blobs import map_enospc
from reftserve.server.storage.leases import Lease, LeaseLost, require_attempts_left, require_lease
from reftserve.server.storage.outages import UNREACHABLE, Outages
from reftserve.server.storage.tables import Job
from reftserve.server.training.activation_cache import ActivationCaches, Arena
from reftserve.server.training.job_data import JobData
from reftserve.server.training.job_files import JobFiles
from reftserve.server.training.job_repository import JobRepository, finish
from reftserve.server.training.pace import Pace
from reftserve.server.training.plan import Plan
from reftserve.server.training.progress import Progress
from reftserve.server.training.sweep import Sweep, cache_sites, make_trainers
from reftserve.server.training.trainer import Trainer
from reftserve.server.training.varlen import VarlenModel

logger = logging.getLogger(__name__)
METRICS_FILE_FIELDS = ("step", "train_loss", "learning_rate", "valid_loss", "valid_exact_match")


class Paused(Exception):
    """A pause was requested before the job's first step."""


class JobRunner:
    """Runs a worker's jobs, one after the other. A succeeded job leaves its activations to the next, until `forget`."""

    def __init__(
        self,
        store: Store,
        base: Base,
        varlen: VarlenModel,
        files: JobFiles,
        *,
        checkpoint_steps: int,
        activation_cache_bytes: int,
        activation_cache_disk_bytes: int,
        scratch: Path,
    ) -> None:
        self._store = store
        self._base = base
        self._varlen = varlen
        self._files = files
        self._checkpoint_steps = checkpoint_steps
        self._activation_cache_bytes, self._activation_cache_disk_bytes, self._scratch = (
            activation_cache_bytes,
            activation_cache_disk_bytes,
            scratch,
        )
        self._repository = JobRepository(store.database)
        self._data = JobData(base, store.files, files, self._repository)
        self._pace = Pace()
        self._progress: Progress | None = None
        self._caches: ActivationCaches | None = None

    def execute(self, lease: Lease[Job]) -> None:
        """Run the job to its end, a pause or the lease's loss, and free its memory. Raises one of `OUTAGES`."""
        succeeded = False
        try:
            succeeded = self._run(lease)
        except LeaseLost as cause:
            # Logged as text: a log record that holds the exception would hold the trainer's memory too.
            logger.warning("%s", str(cause))
        finally:
            if not succeeded:
                self._caches = None
            _free_memory()

    def forget(self) -> None:
        """Free the activations that the last job left for a next one."""
        if self._caches is not None:
            self._caches = None
            _free_memory()

    def begin(self, lease: Lease[Job]) -> Sweep:
        """Check base and data, and return the trials at the newest checkpoint. Raises Paused or ServerError."""
        self._progress = Progress(self._repository, lease)
        job = self._repository.get(lease.id)
        require_attempts_left(lease, "the job's next checkpoint")
        self._require_base(job)

        def poll() -> None:
            if self._repository.pause_requested(lease):
                raise Paused

        job = self._data.prepared(lease, job, poll)
        plan = Plan.model_validate(job.plan)
        splits = self._data.splits(job)
        sweep = Sweep(self._trainers(job, plan, splits, poll), patience=plan.early_stopping_epochs)
        self._pace = Pace()
        checkpoint = self._files.newest_checkpoint(lease)
        if checkpoint is not None:
            sweep.load(checkpoint)
            self._progress.load(checkpoint)
            self._repository.event(lease, f"Resumed from the checkpoint at step {sweep.step}")
            return sweep
        trials = f"{len(sweep.running)} trials, up to " if len(sweep.running) > 1 else ""
        parameters = max(trial.trainer.intervention.num_parameters for trial in sweep.running)
        self._repository.event(
            lease,
            f"Training {trials}{parameters} parameters on {len(splits.train)} examples for {sweep.total_steps} steps; "
            f"{len(splits.validation)} examples select, {len(splits.test)} score",
        )
        return sweep

    def advance(self, lease: Lease[Job], sweep: Sweep) -> bool:
        """Train to the next checkpoint, and return whether it was reached; False: the job was paused."""
        until = min(sweep.step + self._checkpoint_steps, sweep.total_steps)
        while sweep.step < until and not sweep.has_ended:
            if self._repository.pause_requested(lease):
                self._progress_of(lease).flush()
                self._save_checkpoint(lease, sweep)
                if self._repository.pause(lease, f"The job was paused after {sweep.step} steps"):
                    return False
            self._one_step(lease, sweep)
        self._save_checkpoint(lease, sweep)
        return True

    def publish(self, lease: Lease[Job], sweep: Sweep) -> str:
        """Score on the test split, then publish and end the job in one transaction; return `name@version`."""
        self._progress_of(lease).flush()
        job = self._repository.get(lease.id)
        steps = self._repository.steps(job.id)
        trainer = sweep.leader
        choices = [choice.model_dump() for choice in sweep.choices]
        if sweep.diverged:
            self._repository.event(
                lease,
                f"Training diverged at step {trainer.step}; the published weights are the best before it, of step "
                f"{(trainer.best or {})['step']}. A lower learning_rate may help",
                level="warn",
            )
        edits = trainer.best_edits()
        scores = {
            "base": trainer.evaluate(trainer.splits.test, []),
            "intervention": trainer.evaluate(trainer.splits.test, edits),
        }
        self._repository.event(lease, f"Test scores of base and intervention: {scores}", data={"test": scores})
        results = self._store.files.put_result(
            job.owner,
            job.id,
            f"{job.id}.csv",
            _metrics_csv(steps),
            check=lambda session: require_lease(session, lease),
        )

        def end(session: Session, published_id: str) -> None:
            finish(
                session,
                require_lease(session, lease),
                "succeeded",
                f"Published {published_id}",
                fine_tuned_model=published_id,
                plan={**trainer.plan.model_dump(mode="json"), "sweep": job.plan["sweep"], "choices": choices},
                trained_tokens=trainer.trained_tokens,
                result_files=[results.id],
            )

        with tempfile.TemporaryDirectory() as scratch:
            artifact = Path(scratch) / "artifact"
            self._save_artifact(artifact, edits, trainer, self._provenance(job, sweep, scores), steps)
            published = self._store.interventions.publish(job.owner, job.suffix, artifact, job_id=job.id, alongside=end)
        self._files.remove(job.id)
        return published.id

    def fail(self, lease: Lease[Job], cause: Exception) -> None:
        """End the job as failed with `cause`, on a full disk as soon as there is room; its last checkpoint stays."""
        if not isinstance(cause, ServerError):
            logger.error("job %s failed", lease.id, exc_info=cause)
        error = {
            "code": getattr(cause, "code", "internal_error"),
            "message": str(cause) or type(cause).__name__,
            "param": getattr(cause, "param", None),
        }
        outages = Outages()
        while True:
            try:
                self._progress_of(lease).flush()
                self._repository.end(lease, "failed", f"The job failed: {error['message']}", level="error", error=error)
                return
            except StorageFull as full:
                outages.wait(full)

    def _run(self, lease: Lease[Job]) -> bool:
        try:
            sweep = self.begin(lease)
            while not sweep.has_ended:
                if not self.advance(lease, sweep):
                    return False
            self.publish(lease, sweep)
            return True
        except Paused:
            # If the pause was withdrawn in the meantime, the job runs.
            return not self._repository.pause(lease, "The job was paused during data preparation") and self._run(lease)
        except (LeaseLost, *UNREACHABLE):
            raise
        except Exception as cause:
            self.fail(lease, cause)
            return False

    def _one_step(self, lease: Lease[Job], sweep: Sweep) -> None:
        began, trials = time.monotonic(), len(sweep.running)
        metrics = sweep.advance()
        seconds = time.monotonic() - began
        scores = sweep.validate() if sweep.validates else {}
        step: dict[str, Any] = {
            "step": metrics.step,
            "train_loss": metrics.loss if math.isfinite(metrics.loss) else None,
            "learning_rate": metrics.learning_rate,
            "tokens_per_second": metrics.tokens / seconds,
        }
        if trials > 1:
            step["trials"] = trials
        eta_s = self._pace.eta_s(trials, sweep.remaining_steps)
        self._progress_of(lease).add(step | scores, total_steps=sweep.total_steps, eta_s=eta_s)

    def _progress_of(self, lease: Lease[Job]) -> Progress:
        if self._progress is None or self._progress.lease != lease:
            self._progress = Progress(self._repository, lease)
        return self._progress

    def _trainers(self, job: Job, plan: Plan, splits: Splits, poll: Callable[[], object]) -> list[Trainer]:
        data = (job.data or {})["hash"]
        caches = self._caches
        if caches is None or not caches.is_valid_for(data, cache_sites(plan).values()):
            arena = Arena(self._activation_cache_bytes, self._activation_cache_disk_bytes, self._scratch)
            caches = self._caches = ActivationCaches(self._varlen, arena, data=data)
        return make_trainers(caches, splits, plan, seed=job.seed, poll=poll)

    def _require_base(self, job: Job) -> None:
        if job.base is None:
            return  # made before jobs recorded it
        try:
            self._base.fingerprint.require(BaseFingerprint(**job.base))
        except FingerprintMismatch as cause:
            raise Conflict(
                f"the job was made for another base than the current {self._base.name!r}: {cause}",
                param="model",
                code=cause.code,
            ) from cause

    def _save_checkpoint(self, lease: Lease[Job], sweep: Sweep) -> None:
        metrics = {"step": sweep.step, "best": sweep.leader.best or {}}
        progress = self._progress_of(lease)

        def write(folder: Path) -> None:
            sweep.save(folder)
            progress.save(folder)

        self._files.write_checkpoint(lease, sweep.step, metrics, write)

    def _save_artifact(
        self,
        folder: Path,
        edits: Sequence[PlacedEdit],
        trainer: Trainer,
        provenance: Provenance,
        steps: Sequence[dict[str, Any]],
    ) -> None:
        plan = trainer.plan
        with map_enospc("the artifact"):
            save_artifact(
                folder,
                edits,
                family=plan.family,
                positions=plan.positions,
                rank=plan.rank,
                tied=plan.tied,
                base=self._base.fingerprint,
                parameters=trainer.intervention.num_parameters,
                provenance=provenance,
                history=History.of_steps(steps),
            )

    def _provenance(self, job: Job, sweep: Sweep, scores: dict[str, dict[str, float]]) -> Provenance:
        trainer, splits = sweep.leader, sweep.leader.splits
        return Provenance(
            source="trained",
            dataset_hash=(job.data or {})["hash"],
            hyperparameters=trainer.plan.model_dump(),
            sweep=sweep.table,
            choices=[choice.model_dump() for choice in sweep.choices],
            losses={f"validation_{name}": value for name, value in (trainer.best or {}).items()},
            scores=scores,
            seconds=time.time() - (job.started_at or time.time()),
            seed=job.seed,
            code_version=version("reftserve"),
            examples={"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        )


def _metrics_csv(steps: Sequence[dict[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, METRICS_FILE_FIELDS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(steps)
    return buffer.getvalue().encode()


def _free_memory() -> None:
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
