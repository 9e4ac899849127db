"""A store with evals and any number of evaluators in one process, on a stub engine with constant logprobs."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from api_data import chat_lines

from reftserve.client.schemas import EvalCreate, EvalRunCreate
from reftserve.server.base.folder import open_base
from reftserve.server.engine.messages import Ready, Submit, TokenOutput
from reftserve.server.evaluation.eval_service import EvalService
from reftserve.server.evaluation.evaluator import Evaluator
from reftserve.server.evaluation.serving_fingerprint import ServingFingerprint, serving_fingerprint
from reftserve.server.inference.metrics import Metrics
from reftserve.server.inference.service import InferenceLimits, InferenceService
from reftserve.server.registry.store import open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.tables import EvalItem, EvalRun

OWNER = "default"


class StubEngine:
    is_alive = True
    ready = Ready(max_context=512, device="cpu", dtype="float32", max_sequences=64, block_size=16)
    stats = None
    num_requests = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def generate(self, request: Submit) -> AsyncGenerator[TokenOutput]:
        self.asked.append(request.request_id)
        await asyncio.sleep(0.01)
        logprobs = [[-1.0] * len(each) for each in request.continuations]
        yield TokenOutput(request.request_id, [], "stop", continuation_logprobs=logprobs)


class EvalWorkspace:
    def __init__(self, model_folder: Path, data: Path) -> None:
        self.settings = Settings(model=str(model_folder), data=data, device="cpu")
        self.base = open_base(self.settings)
        self.served = serving_fingerprint(self.base, dtype="float32", quantization="none")
        self.store = open_store(self.settings, self.base.fingerprint)
        self.evals = self.service(self.served)
        self.engine = StubEngine()

    def service(self, served: ServingFingerprint) -> EvalService:
        return EvalService(self.store, self.base, lambda: served, max_interventions=8)

    def created(self, count: int) -> EvalRun:
        file = self.store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(chat_lines(count)))
        source = {"type": "file", "file_id": file.id}
        body = {"data_source_config": source, "testing_criteria": [{"type": "loss"}]}
        made = self.evals.create(OWNER, EvalCreate.model_validate(body))
        run = EvalRunCreate.model_validate({"data_source": {"type": "completions", "model": self.base.name}})
        return self.evals.create_run(OWNER, made.id, run)

    def change(self, run: EvalRun, **fields: Any) -> None:
        with self.store.database.session() as session:
            row = session.get_one(EvalRun, run.id)
            for name, value in fields.items():
                setattr(row, name, value)

    def row(self, run: EvalRun) -> EvalRun:
        return self.evals.get_run(OWNER, run.eval_id, run.id)

    def items(self, run: EvalRun) -> list[EvalItem]:
        return self.evals.items(OWNER, run.eval_id, run.id, after=-1, status=None, limit=1000)[0]

    def evaluator(self, served: ServingFingerprint | None = None) -> Evaluator:
        evals = self.evals if served is None else self.service(served)
        limits = InferenceLimits(max_queue=1024, max_wait_s=60.0, max_interventions=8, max_stop_strings=16)
        metrics = Metrics(lambda: None)
        inference = InferenceService(self.engine, self.base, self.store.interventions, metrics, limits)
        return Evaluator(self.store, evals, inference, lease_s=60)

    def execute(self, run: EvalRun, *evaluators: Evaluator) -> EvalRun:
        async def work() -> None:
            tasks = [asyncio.create_task(each.run_forever()) for each in evaluators]
            while self.row(run).finished_at is None:
                await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(asyncio.wait_for(work(), 60))
        return self.row(run)
