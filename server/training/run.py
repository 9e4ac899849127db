"""One job's run, in durable steps: begin, advance (again and again), publish. The worker calls them through DBOS.

Each can be repeated after a crash: begin copies the data and plans; advance goes from one checkpoint to the next;
publish makes the artifact and hands it to the registry, which takes it once.

    data folder / jobs / <id> /  training.jsonl  validation.jsonl  checkpoint-<step>/
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reftserve.interventions import Provenance, save_artifact
from reftserve.server.base_model import Base
from reftserve.server.errors import InvalidRequest
from reftserve.server.registry.store import Store
from reftserve.server.storage.tables import Job
from reftserve.server.training.data import EncodedExample, Splits, dataset_hash, encode, read_examples, split
from reftserve.server.training.job_log import ENDED, JobLog
from reftserve.server.training.recipe import Plan
from reftserve.server.training.trainer import Trainer

CANCELLED = -1
KEPT_CHECKPOINTS = 2
METRICS_FILE_FIELDS = ("step", "train_loss", "learning_rate", "valid_loss", "valid_exact_match")


class Runs:
    """The runs of one worker: at most one trainer is in memory."""

    def __init__(
        self, store: Store, base: Base, model: PreTrainedModel, folder: Path, *, checkpoint_steps: int
    ) -> None:
        self._store = store
        self._base = base
        self._model = model
        self._folder = folder
        self._checkpoint_steps = checkpoint_steps
        self._log = JobLog(store.database)
        self._current: tuple[str, Trainer] | None = None

    def begin(self, job_id: str) -> int:
        """Copy and check the data; the number of optimizer steps to do, or CANCELLED."""
        if not self._log.start(job_id):
            return CANCELLED
        job = self._log.get(job_id)
        folder = self._folder / job_id
        folder.mkdir(parents=True, exist_ok=True)
        for file_id, target in ((job.training_file, "training"), (job.validation_file, "validation")):
            if file_id is not None:
                row = self._store.files.get(job.owner, file_id, param=f"{target}_file")
                shutil.copyfile(self._store.files.path(row), folder / f"{target}.jsonl")
        trainer = self._trainer(job_id, 0)
        splits = trainer.splits
        self._log.event(
            job_id,
            f"Training {trainer.intervention.num_parameters} parameters on {len(splits.train)} examples for "
            f"{trainer.total_steps} steps; {len(splits.validation)} examples select, {len(splits.test)} score",
        )
        return trainer.total_steps

    def advance(self, job_id: str, step: int) -> int:
        """Train from checkpoint `step` to the next; the step reached, or CANCELLED."""
        if self._log.get(job_id).status in ENDED:
            return CANCELLED
        trainer = self._trainer(job_id, step)
        until = min(step + self._checkpoint_steps, trainer.total_steps)
        while trainer.step < until:
            if self._log.cancel_requested(job_id):
                self._forget(job_id)
                self._log.end(job_id, "cancelled", f"The job was cancelled after {trainer.step} steps")
                return CANCELLED
            self._one_step(job_id, trainer)
        self._save_checkpoint(job_id, trainer)
        return trainer.step

    def publish(self, job_id: str) -> str:
        """Score base and best intervention on the test split, publish, and end the job; `name@version`."""
        job = self._log.get(job_id)
        if job.status in ENDED:
            return job.fine_tuned_model or ""
        trainer = self._trainer(job_id, None)
        edits = trainer.best_edits()
        scores = {
            "base": trainer.evaluate(trainer.splits.test, []),
            "intervention": trainer.evaluate(trainer.splits.test, edits),
        }
        artifact = self._folder / job_id / "artifact"
        shutil.rmtree(artifact, ignore_errors=True)
        plan = trainer.plan
        save_artifact(
            artifact,
            edits,
            family=plan.family,
            positions=plan.positions,
            rank=plan.rank,
            tied=plan.tied,
            base=self._base.fingerprint,
            parameters=trainer.intervention.num_parameters,
            provenance=self._provenance(job, trainer, scores),
        )
        published = self._store.interventions.publish(job.owner, job.suffix, artifact, job_id=job_id)
        results = self._store.files.put_result(job.owner, job_id, f"{job_id}.csv", self._metrics_csv(job_id))
        self._log.event(job_id, f"Test scores of base and intervention: {scores}", data={"test": scores})
        self._log.end(
            job_id,
            "succeeded",
            f"Published {published.id}",
            fine_tuned_model=published.id,
            trained_tokens=trainer.trained_tokens,
            result_files=[results.id],
        )
        self._forget(job_id)
        return published.id

    def fail(self, job_id: str, cause: Exception) -> None:
        """End the job with a reason."""
        error = {
            "code": getattr(cause, "code", "internal_error"),
            "message": str(cause) or type(cause).__name__,
            "param": getattr(cause, "param", None),
        }
        self._log.end(job_id, "failed", f"The job failed: {error['message']}", level="error", error=error)
        self._forget(job_id)

    def _one_step(self, job_id: str, trainer: Trainer) -> None:
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
        self._log.event(
            job_id, f"Step {metrics.step}/{trainer.total_steps}: training loss {metrics.loss:.4f}", data=data
        )
        self._log.update(job_id, estimated_finish=int(time.time() + remaining * seconds))

    def _trainer(self, job_id: str, step: int | None) -> Trainer:
        """The job's trainer at a checkpoint (None: the newest), from memory when it stands there."""
        if self._current is not None and self._current[0] == job_id and step in (None, self._current[1].step):
            return self._current[1]
        job = self._log.get(job_id)
        plan = Plan.model_validate(job.plan)
        trainer = Trainer(self._model, self._splits(job, plan), plan, seed=job.seed)
        step = trainer.total_steps if step is None else step
        if step > 0:
            trainer.load(self._checkpoint(job_id, step))
            self._log.event(job_id, f"Resumed from the checkpoint at step {step}", level="warn")
        self._current = (job_id, trainer)
        return trainer

    def _splits(self, job: Job, plan: Plan) -> Splits:
        folder = self._folder / job.id
        training = self._encoded(job.id, folder / "training.jsonl", plan)
        validation = self._encoded(job.id, folder / "validation.jsonl", plan) if job.validation_file else None
        return split(training, validation, seed=job.seed)

    def _encoded(self, job_id: str, path: Path, plan: Plan) -> Sequence[EncodedExample]:
        encoded = [encode(self._base.tokenizer, example) for example in read_examples(path)]
        fitting = [example for example in encoded if example.length <= plan.max_length]
        if len(fitting) < len(encoded):
            self._log.event(
                job_id,
                f"{path.stem}: left out {len(encoded) - len(fitting)} of {len(encoded)} examples, longer than "
                f"max_length, {plan.max_length} tokens",
                level="warn",
            )
        if not fitting:
            raise InvalidRequest(
                f"every example is longer than max_length, {plan.max_length} tokens", param=f"{path.stem}_file"
            )
        return fitting

    def _checkpoint(self, job_id: str, step: int) -> Path:
        return self._folder / job_id / f"checkpoint-{step}"

    def _save_checkpoint(self, job_id: str, trainer: Trainer) -> None:
        target = self._checkpoint(job_id, trainer.step)
        scratch = target.with_suffix(".partial")
        for leftover in (scratch, target):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        trainer.save(scratch)
        scratch.rename(target)
        best = trainer.best or {}
        self._log.checkpoint(job_id, trainer.step, target.name, {"step": trainer.step, "best": best})
        for old in self._log.checkpoints(job_id)[KEPT_CHECKPOINTS:]:
            shutil.rmtree(self._folder / job_id / old.path, ignore_errors=True)

    def _provenance(self, job: Job, trainer: Trainer, scores: dict[str, dict[str, float]]) -> Provenance:
        folder = self._folder / job.id
        data = [path for path in (folder / "training.jsonl", folder / "validation.jsonl") if path.exists()]
        splits = trainer.splits
        return Provenance(
            source="trained",
            dataset_hash=dataset_hash(data),
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

    def _forget(self, job_id: str) -> None:
        """Free the memory and the disk that only a living job needs."""
        self._current = None
        shutil.rmtree(self._folder / job_id, ignore_errors=True)
