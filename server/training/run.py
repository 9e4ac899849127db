"""One job's run under its lease: begin, advance (again and again), publish.

Each can be repeated after a crash: begin copies the data and goes to the newest checkpoint; advance goes on to
the next; publish makes the artifact and hands it to the registry, which takes it once, in the transaction that ends the
job.
"""

from __future__ import annotations

import csv
import gc
import io
import logging
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.orm import Session
from transformers import PreTrainedModel

from reftserve.interventions import BaseFingerprint, FingerprintMismatch, PlacedEdit, Provenance, save_artifact
from reftserve.server.base_model import Base
from reftserve.server.errors import Conflict, InvalidRequest, ServerError
from reftserve.server.registry.store import Store
from reftserve.server.storage.blobs import no_room_for
from reftserve.server.storage.tables import Job
from reftserve.server.training.dataset import EncodedExample, Splits, dataset_hash, encode, read_examples, split
from reftserve.server.training.job_files import JobFiles
from reftserve.server.training.job_log import JobLog, finish
from reftserve.server.training.leases import Lease, LeaseLost, held
from reftserve.server.training.recipe import Plan
from reftserve.server.training.trainer import Trainer

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 20
METRICS_FILE_FIELDS = ("step", "train_loss", "learning_rate", "valid_loss", "valid_exact_match")


class Runs:
    """The runs of one worker, one after the other."""

    def __init__(
        self, store: Store, base: Base, model: PreTrainedModel, files: JobFiles, *, checkpoint_steps: int
    ) -> None:
        self._store = store
        self._base = base
        self._model = model
        self._files = files
        self._checkpoint_steps = checkpoint_steps
        self._log = JobLog(store.database)

    def carry(self, lease: Lease) -> None:
        """From where the job stands to its end, its pause, or the loss of the lease; then its memory is free again."""
        try:
            self._run(lease)
        except LeaseLost as cause:
            # As text: a record that keeps the exception keeps the trainer with it.
            logger.warning("%s", str(cause))
        finally:
            _free_memory()

    def begin(self, lease: Lease) -> Trainer:
        """Check the base, copy and check the data; a trainer at the job's newest checkpoint.

        Raises ServerError when data or base are gone, or the job has ended too many workers.
        """
        job = self._log.get(lease.job_id)
        if lease.attempt > MAX_ATTEMPTS:
            raise ServerError(
                f"{MAX_ATTEMPTS} times in a row a worker ended before the job's next checkpoint", code="worker_lost"
            )
        self._require_base(job)
        plan = Plan.model_validate(job.plan)
        trainer = Trainer(self._model, self._splits(lease, job, plan), plan, seed=job.seed)
        checkpoint = self._files.newest_checkpoint(lease)
        if checkpoint is not None:
            trainer.load(checkpoint)
            self._log.event(lease, f"Resumed from the checkpoint at step {trainer.step}")
            return trainer
        splits = trainer.splits
        self._log.event(
            lease,
            f"Training {trainer.intervention.num_parameters} parameters on {len(splits.train)} examples for "
            f"{trainer.total_steps} steps; {len(splits.validation)} examples select, {len(splits.test)} score",
        )
        return trainer

    def advance(self, lease: Lease, trainer: Trainer) -> bool:
        """Train to the next checkpoint; False when the job was paused on the way."""
        until = min(trainer.step + self._checkpoint_steps, trainer.total_steps)
        while trainer.step < until:
            if self._log.pause_requested(lease):
                self._save_checkpoint(lease, trainer)
                self._log.pause(lease, f"The job was paused after {trainer.step} steps")
                return False
            self._one_step(lease, trainer)
        self._save_checkpoint(lease, trainer)
        return True

    def publish(self, lease: Lease, trainer: Trainer) -> str:
        """Score base and best intervention on the test split, publish, and end the job; `name@version`."""
        job = self._log.get(lease.job_id)
        edits = trainer.best_edits()
        scores = {
            "base": trainer.evaluate(trainer.splits.test, []),
            "intervention": trainer.evaluate(trainer.splits.test, edits),
        }
        self._log.event(lease, f"Test scores of base and intervention: {scores}", data={"test": scores})
        results = self._store.files.put_result(
            job.owner, job.id, f"{job.id}.csv", self._metrics_csv(job.id), check=lambda session: held(session, lease)
        )

        def end(session: Session, published_id: str) -> None:
            finish(
                session,
                held(session, lease),
                "succeeded",
                f"Published {published_id}",
                fine_tuned_model=published_id,
                trained_tokens=trainer.trained_tokens,
                result_files=[results.id],
            )

        with tempfile.TemporaryDirectory() as scratch:
            artifact = Path(scratch) / "artifact"
            self._save_artifact(artifact, edits, trainer, self._provenance(job, trainer, scores))
            published = self._store.interventions.publish(job.owner, job.suffix, artifact, job_id=job.id, alongside=end)
        self._files.remove(job.id)
        return published.id

    def fail(self, lease: Lease, cause: Exception) -> None:
        """End the job with a reason; its last checkpoint stays for a retry."""
        if not isinstance(cause, ServerError):
            logger.error("job %s failed", lease.job_id, exc_info=cause)
        error = {
            "code": getattr(cause, "code", "internal_error"),
            "message": str(cause) or type(cause).__name__,
            "param": getattr(cause, "param", None),
        }
        self._log.end(lease, "failed", f"The job failed: {error['message']}", level="error", error=error)

    def _run(self, lease: Lease) -> None:
        try:
            trainer = self.begin(lease)
            while trainer.step < trainer.total_steps:
                if not self.advance(lease, trainer):
                    return
            self.publish(lease, trainer)
        except LeaseLost:
            raise
        except Exception as cause:
            self.fail(lease, cause)

    def _one_step(self, lease: Lease, trainer: Trainer) -> None:
        began = time.monotonic()
        metrics = trainer.advance()
        seconds = time.monotonic() - began
        remaining = trainer.total_steps - metrics.step
        data: dict[str, Any] = {
            "step": metrics.step,
            "total_steps": trainer.total_steps,
            "train_loss": metrics.loss,
            "learning_rate": metrics.learning_rate,
            "tokens_per_second": metrics.tokens / seconds,
            "eta_s": remaining * seconds,
        }
        if trainer.ends_epoch:
            score = trainer.validate()
            data |= {f"valid_{name}": value for name, value in score.items()}
        self._log.progress(
            lease,
            f"Step {metrics.step}/{trainer.total_steps}: training loss {metrics.loss:.4f}",
            data,
            estimated_finish=int(time.time() + remaining * seconds),
        )

    def _require_base(self, job: Job) -> None:
        if job.base is None:
            return  # made before jobs recorded it
        try:
            self._base.fingerprint.require(BaseFingerprint(**job.base))
        except FingerprintMismatch as cause:
            raise Conflict(
                f"the job was made for another base than {self._base.name!r} now is: {cause}",
                param="model",
                code=cause.code,
            ) from cause

    def _data(self, job: Job) -> dict[str, Path]:
        """The job's copies of its data sets, made now if it has none.

        Raises NotFound when there is no copy and the uploaded file has gone.
        """
        copies = {}
        for name, file_id in (("training", job.training_file), ("validation", job.validation_file)):
            if file_id is not None:
                copies[name] = self._files.data(job.id, name) or self._copy(job, name, file_id)
        return copies

    def _copy(self, job: Job, name: str, file_id: str) -> Path:
        param = f"{name}_file"
        row = self._store.files.get(job.owner, file_id, param=param)
        return self._files.keep_data(job.id, name, self._store.files.path(row, param=param))

    def _splits(self, lease: Lease, job: Job, plan: Plan) -> Splits:
        parts = {name: self._encoded(lease, path, plan) for name, path in self._data(job).items()}
        return split(parts["training"], parts.get("validation"), seed=job.seed)

    def _encoded(self, lease: Lease, path: Path, plan: Plan) -> Sequence[EncodedExample]:
        encoded = [encode(self._base.tokenizer, example) for example in read_examples(path)]
        fitting = [example for example in encoded if example.length <= plan.max_length]
        if len(fitting) < len(encoded):
            self._log.event(
                lease,
                f"{path.stem}: left out {len(encoded) - len(fitting)} of {len(encoded)} examples, longer than "
                f"max_length, {plan.max_length} tokens",
                level="warn",
            )
        if not fitting:
            raise InvalidRequest(
                f"every example is longer than max_length, {plan.max_length} tokens", param=f"{path.stem}_file"
            )
        return fitting

    def _save_checkpoint(self, lease: Lease, trainer: Trainer) -> None:
        metrics = {"step": trainer.step, "best": trainer.best or {}}
        self._files.write_checkpoint(lease, trainer.step, metrics, trainer.save)

    def _save_artifact(
        self, folder: Path, edits: Sequence[PlacedEdit], trainer: Trainer, provenance: Provenance
    ) -> None:
        plan = trainer.plan
        with no_room_for("the artifact"):
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
            )

    def _provenance(self, job: Job, trainer: Trainer, scores: dict[str, dict[str, float]]) -> Provenance:
        splits = trainer.splits
        return Provenance(
            source="trained",
            dataset_hash=dataset_hash(list(self._data(job).values())),
            hyperparameters=job.plan,
            losses={f"validation_{name}": value for name, value in (trainer.best or {}).items()},
            scores=scores,
            seconds=time.time() - (job.started_at or time.time()),
            seed=job.seed,
            code_version=version("reftserve"),
            examples={"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        )

    def _metrics_csv(self, job_id: str) -> bytes:
        by_step = {e.data["step"]: e.data for e in reversed(self._all_events(job_id)) if e.data and "step" in e.data}
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, METRICS_FILE_FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(by_step[step] for step in sorted(by_step))
        return buffer.getvalue().encode()

    def _all_events(self, job_id: str) -> Sequence[Any]:
        return self._log.events(job_id, before=None, limit=10**9)


def _free_memory() -> None:
    """What trainers held comes back now, not when the collector gets to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
