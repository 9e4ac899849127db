"""/v1/models: the base first, then every intervention."""

from __future__ import annotations

from fastapi import APIRouter

from reftserve.client.schemas import Deleted, Model, Page
from reftserve.server.api.dependencies import BaseInfo, Owner, Registry
from reftserve.server.base.folder import Base
from reftserve.server.errors import InvalidRequest, NotFound
from reftserve.server.registry.names import Reference, suggestion

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(base: BaseInfo, registry: Registry, owner: Owner) -> Page[Model]:
    """List the values that `model` can have."""
    interventions = [
        Model(id=row.name, created=row.created_at, owned_by=row.owner, parent=base.name)
        for row in registry.list_all(owner)
    ]
    return Page(data=[_base_model(base), *interventions])


@router.get("/{model:path}")
def get_model(model: str, base: BaseInfo, registry: Registry, owner: Owner) -> Model:
    """Return the base, or an intervention by `name`, `name@version` or `name@alias`."""
    if model == base.name:
        return _base_model(base)
    try:
        version = registry.resolve(owner, Reference.parse(model))
    except NotFound as cause:
        near = "" if "Did you mean" in cause.message else suggestion(model, [base.name])
        raise NotFound(cause.message + near, param="model", code="model_not_found") from cause
    return Model(id=model, created=version.row.created_at, owned_by=version.row.owner, parent=base.name)


@router.delete("/{model:path}")
def delete_model(model: str, base: BaseInfo, registry: Registry, owner: Owner) -> Deleted:
    """Delete an intervention, or one version by `name@version`."""
    if model == base.name:
        raise InvalidRequest("the base model cannot be deleted", param="model")
    reference = Reference.parse(model)
    registry.delete(owner, reference.name, reference.version if "@" in model else None)
    return Deleted(id=model, object="model")


def _base_model(base: Base) -> Model:
    return Model(id=base.name, created=base.created_at, owned_by="reftserve")
