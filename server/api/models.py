"""/v1/models: the base first, then every intervention."""

from __future__ import annotations

from fastapi import APIRouter, Query

from reftserve.client.schemas import Deleted, Model, Page
from reftserve.server.api.dependencies import BaseInfo, Owner, Registry
from reftserve.server.api.envelope import page
from reftserve.server.base.folder import Base
from reftserve.server.errors import InvalidRequest, NotFound
from reftserve.server.registry.names import Reference, suggestion

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(
    base: BaseInfo,
    registry: Registry,
    owner: Owner,
    after: str | None = None,
    limit: int = Query(10_000, ge=1, le=10_000),
) -> Page[Model]:
    """List the values that `model` can have: the base, then interventions by name."""
    first = [_base_model(base)] if after is None else []
    behind = None if after == base.name else after
    names, more = registry.list_names(owner, after=behind, limit=limit - len(first))
    interventions = [
        Model(id=name, created=created_at, owned_by=row_owner, parent=base.name)
        for name, row_owner, created_at in names
    ]
    models = [*first, *interventions]
    return page(models, [model.id for model in models], has_more=more)


@router.get("/{model:path}")
def get_model(model: str, base: BaseInfo, registry: Registry, owner: Owner) -> Model:
    """Return the base, or an intervention by `name`, `name@version` or `name@alias`."""
    if model == base.name:
        return _base_model(base)
    try:
        version = registry.find(owner, Reference.parse(model))
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
