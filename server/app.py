"""The HTTP application: its services, routers, error handlers and child processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from prometheus_fastapi_instrumentator import Instrumentator
from sse_starlette.sse import AppStatus
from starlette.middleware.cors import CORSMiddleware

from reftserve.server.api import (
    chat,
    classify,
    completions,
    evals,
    files,
    fine_tuning,
    health,
    index,
    interventions,
    models,
)
from reftserve.server.api.body_limit import BodyLimit
from reftserve.server.api.content_encoding import ContentEncoding
from reftserve.server.api.dependencies import check_parameters
from reftserve.server.api.error_responses import install_error_handlers
from reftserve.server.api.host_check import HostCheck, names_of
from reftserve.server.api.openapi import ERROR_RESPONSES, describe_truly
from reftserve.server.api.origin_check import OriginCheck
from reftserve.server.api.request_line import RequestLine
from reftserve.server.base.folder import Base, open_base
from reftserve.server.engine.config import EngineConfig
from reftserve.server.evaluation.eval_service import EvalService
from reftserve.server.evaluation.evaluator import Evaluator
from reftserve.server.evaluation.serving_fingerprint import serving_fingerprint
from reftserve.server.inference.engine_client import EngineClient
from reftserve.server.inference.metrics import Metrics
from reftserve.server.inference.service import InferenceLimits, InferenceService
from reftserve.server.registry.store import open_store
from reftserve.server.services import Services
from reftserve.server.settings import Settings
from reftserve.server.supervisor import supervise
from reftserve.server.training.data_check import DataCheck
from reftserve.server.training.job_service import JobService

UNMETERED = ["/health", "/ready", "/metrics"]  # probes and scrapes are no users' requests
ROUTERS = (chat, completions, classify, models, files, fine_tuning, evals, interventions, health, index)


def open_services(settings: Settings) -> Services:
    """Create the application's services, without starting the engine. Raises NotFound when there is no base model."""
    base = open_base(settings)
    store = open_store(settings, base.fingerprint)
    store.sweep_in_background()
    engine = EngineClient(_engine_config(settings, base))
    metrics = Metrics(lambda: engine.stats)
    limits = InferenceLimits(
        max_queue=settings.max_queue,
        max_wait_s=settings.max_wait_s,
        max_interventions=settings.max_interventions,
        max_stop_strings=settings.max_stop_strings,
    )
    inference = InferenceService(engine, base, store.interventions, metrics, limits)
    evals = EvalService(
        store,
        base,
        lambda: serving_fingerprint(base, dtype=engine.dtype, quantization=settings.quantization),
        max_interventions=settings.max_interventions,
    )
    return Services(
        settings=settings,
        base=base,
        database=store.database,
        files=store.files,
        registry=store.interventions,
        jobs=JobService(store, base, DataCheck(settings, base)),
        evals=evals,
        inference=inference,
        metrics=metrics,
        engine=engine,
        evaluator=Evaluator(store, evals, inference, lease_s=settings.lease_s),
    )


def create_app(services: Services, on_failure: Callable[[str], None]) -> FastAPI:
    """Create the application. on_failure: takes the reason when the engine or another task cannot be kept running."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        supervision = asyncio.create_task(supervise(services, on_failure))
        yield
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)
        await services.engine.stop()
        services.database.close()

    # Streams end with `drain`; sse_starlette would break them off at the signal.
    AppStatus.enable_automatic_graceful_drain = False
    # FastAPIOffline serves the pages of /docs itself, because many servers cannot reach a content network.
    app: FastAPI = FastAPIOffline(
        title="ReftServe",
        version=version("reftserve"),
        lifespan=lifespan,
        dependencies=[Depends(check_parameters)],
        root_path=services.settings.root_path,
        responses=ERROR_RESPONSES,
        redirect_slashes=False,
        form_limits={
            "max_files": 2,
            "max_fields": 8,
            "max_part_size": 4096,
        },  # one more file, to name it as given twice
    )
    app.state.services = services
    _add_middlewares(app, services.settings)
    install_error_handlers(app)
    Instrumentator(registry=services.metrics.registry, excluded_handlers=UNMETERED).instrument(app)
    for router in ROUTERS:
        app.include_router(router.router)
    describe_truly(app)
    return app


def _add_middlewares(app: FastAPI, settings: Settings) -> None:
    """Add them from the innermost to the outermost."""
    uploads = {"/v1/files": settings.max_file_bytes, "/v1/interventions": settings.max_artifact_bytes}
    app.add_middleware(BodyLimit, upload_bytes=uploads, json_bytes=settings.max_json_bytes)
    app.add_middleware(ContentEncoding)
    app.add_middleware(BodyLimit, upload_bytes=uploads, json_bytes=settings.max_json_bytes)  # of packed bytes
    app.add_middleware(RequestLine)
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "x-should-retry"],
        )
    app.add_middleware(OriginCheck, allowed=origins)
    names = names_of(settings.host, settings.allowed_hosts)
    if names is not None:
        app.add_middleware(HostCheck, names=names)


async def drain(services: Services) -> None:
    """Refuse new requests, and let answers and streams of events end, before the server stops."""
    services.jobs.end_streams()
    await services.inference.drain(services.settings.shutdown_grace_s)


def _engine_config(settings: Settings, base: Base) -> EngineConfig:
    return EngineConfig(
        model_folder=str(base.folder),
        weights_folder=str(settings.weights_folder),
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        cpu_kernels=settings.cpu_kernels,
        cuda_graphs=settings.cuda_graphs,
        threads=settings.engine_threads,
        kv_cache_bytes=settings.kv_cache_bytes,
        block_size=settings.block_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        bank_bytes=settings.bank_bytes,
        host_bytes=settings.host_bytes,
        prefix_cache=settings.prefix_cache,
    )
