"""Dependencies of endpoints, by parameter type: one service each, the owner, and the check of all parameters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request

from reftserve.client.schemas.unicode import half_pair
from reftserve.server import settings
from reftserve.server.api.auth import owner
from reftserve.server.base.folder import Base
from reftserve.server.datasets.file_store import FileStore
from reftserve.server.errors import InvalidRequest
from reftserve.server.evaluation.eval_service import EvalService
from reftserve.server.inference import metrics, service
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.storage import database
from reftserve.server.training.job_service import JobService


def _service(name: str) -> Callable[[Request], Awaitable[Any]]:
    async def get(request: Request) -> Any:  # async: FastAPI would call a plain function in a thread
        return getattr(request.app.state.services, name)

    return get


async def check_parameters(request: Request) -> None:
    """Raise InvalidRequest for a path or query parameter that no database can look up; applies to all endpoints."""
    for name, value in [*request.path_params.items(), *request.query_params.multi_items()]:
        if isinstance(value, str) and ("\0" in value or half_pair(value) is not None):
            raise InvalidRequest(
                f"parameter {name!r} is {value!a}; expected text without NUL and half surrogate pairs",
                param=name,
                code="invalid_value",
            )


async def client_name(request: Request) -> str:
    """Return the name under which the engine shares its places fairly: the client's address."""
    return request.client.host if request.client is not None else ""


BaseInfo = Annotated[Base, Depends(_service("base"))]
Database = Annotated[database.Database, Depends(_service("database"))]
Evals = Annotated[EvalService, Depends(_service("evals"))]
Files = Annotated[FileStore, Depends(_service("files"))]
Inference = Annotated[service.InferenceService, Depends(_service("inference"))]
Jobs = Annotated[JobService, Depends(_service("jobs"))]
Metrics = Annotated[metrics.Metrics, Depends(_service("metrics"))]
Registry = Annotated[InterventionRegistry, Depends(_service("registry"))]
Settings = Annotated[settings.Settings, Depends(_service("settings"))]
Owner = Annotated[str, Depends(owner)]
ClientName = Annotated[str, Depends(client_name)]
