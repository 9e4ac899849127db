"""The services of one server; `api/dependencies.py` gives routers the ones they use."""

from __future__ import annotations

from dataclasses import dataclass

from reftserve.server.base.folder import Base
from reftserve.server.datasets.file_store import FileStore
from reftserve.server.evaluation.eval_service import EvalService
from reftserve.server.evaluation.evaluator import Evaluator
from reftserve.server.inference.engine_client import EngineClient
from reftserve.server.inference.metrics import Metrics
from reftserve.server.inference.service import InferenceService
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.settings import Settings
from reftserve.server.storage.database import Database
from reftserve.server.training.job_service import JobService


@dataclass(frozen=True)
class Services:
    """One server's services. Routers do not use the engine's client and the evaluator, which run in the background."""

    settings: Settings
    base: Base
    database: Database
    files: FileStore
    registry: InterventionRegistry
    jobs: JobService
    evals: EvalService
    inference: InferenceService
    metrics: Metrics
    engine: EngineClient
    evaluator: Evaluator
