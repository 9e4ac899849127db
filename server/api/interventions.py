"""/v1/interventions, native: OpenAI has no versions, aliases, or upload and download of artifacts."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends, File, Form, Query, Response, UploadFile

from reftserve.client.schemas import (
    AliasUpdate,
    Deleted,
    InterventionHistory,
    InterventionInfo,
    InterventionVersion,
    Page,
)
from reftserve.server.api.body_route import BodyRoute
from reftserve.server.api.dependencies import BaseInfo, Owner, Registry, Settings
from reftserve.server.api.envelope import page
from reftserve.server.api.forms import only_fields
from reftserve.server.errors import InvalidRequest, PayloadTooLarge
from reftserve.server.registry.intervention_registry import PublishedVersion
from reftserve.server.registry.names import LATEST, Reference, check_free
from reftserve.server.registry.queries import InterventionSummary

router = APIRouter(prefix="/v1/interventions", tags=["interventions"], route_class=BodyRoute)


@router.get("")
def list_interventions(
    registry: Registry,
    owner: Owner,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "asc",
) -> Page[InterventionInfo]:
    """List interventions by name. `after`: the last name of the page before."""
    rows, more = registry.list_page(owner, after=after, limit=limit, descending=order == "desc")
    return page([_info(row) for row in rows], [row.name for row in rows], has_more=more)


@router.post("", status_code=201, dependencies=[Depends(only_fields("name", "file"))])
def upload_intervention(
    registry: Registry,
    settings: Settings,
    base: BaseInfo,
    owner: Owner,
    name: str = Form(),
    file: UploadFile = File(),
) -> InterventionVersion:
    """Publish a zipped artifact as the next version of `name`."""
    check_free(name, base.name)
    limit = settings.max_artifact_bytes
    data = file.file.read(limit + 1)
    if len(data) > limit:
        raise PayloadTooLarge(f"the artifact has more than {limit} bytes, which is the limit", param="file")
    return _version(registry.upload(owner, name, data))


@router.get("/{name}")
def get_intervention(name: str, registry: Registry, owner: Owner) -> InterventionInfo:
    """Return an intervention with its versions and aliases."""
    return _info(registry.get(owner, name))


@router.delete("/{name}")
def delete_intervention(name: str, registry: Registry, owner: Owner, force: bool = Query(False)) -> Deleted:
    """Delete an intervention with all its versions."""
    registry.delete(owner, name, force=force)
    return Deleted(id=name, object="intervention")


@router.get("/{name}/versions")
def list_versions(
    name: str,
    registry: Registry,
    owner: Owner,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
) -> Page[InterventionVersion]:
    """List the versions of an intervention by number. `after`: the last version's id of the page before, or number."""
    number = None if after is None else _number(after)
    rows, more = registry.list_versions(owner, name, after=number, limit=limit, descending=order == "desc")
    return page([_version(row) for row in rows], [row.id for row in rows], has_more=more)


@router.get("/{name}/versions/{version}")
def get_version(name: str, version: str, registry: Registry, owner: Owner) -> InterventionVersion:
    """Return a version, by number or alias, with its manifest."""
    return _version(registry.find(owner, Reference.parse(f"{name}@{version}")))


@router.get("/{name}/versions/{version}/content", response_class=Response)
def download_version(name: str, version: str, registry: Registry, owner: Owner) -> Response:
    """Return the artifact as a zip of its files."""
    content = registry.download(owner, Reference.parse(f"{name}@{version}"))
    disposition = f'attachment; filename="{name}-{version}.zip"'
    return Response(content, media_type="application/zip", headers={"Content-Disposition": disposition})


@router.get("/{name}/versions/{version}/history")
def get_history(name: str, version: str, registry: Registry, owner: Owner) -> InterventionHistory:
    """Return a version's training history, step by step, in columns."""
    published, history = registry.history(owner, Reference.parse(f"{name}@{version}"))
    return InterventionHistory(id=published.id, **history.model_dump())


@router.delete("/{name}/versions/{version}")
def delete_version(name: str, version: str, registry: Registry, owner: Owner, force: bool = Query(False)) -> Deleted:
    """Delete a version."""
    reference = Reference.parse(f"{name}@{version}")
    deleted = registry.delete(owner, name, reference.version, force=force)
    return Deleted(id=deleted[0], object="intervention.version")


@router.put("/{name}/aliases/{alias}")
def set_alias(name: str, alias: str, update: AliasUpdate, registry: Registry, owner: Owner) -> InterventionInfo:
    """Point an alias at a version."""
    return _info(registry.set_alias(owner, name, alias, update.version))


@router.delete("/{name}/aliases/{alias}")
def delete_alias(name: str, alias: str, registry: Registry, owner: Owner) -> InterventionInfo:
    """Remove an alias."""
    return _info(registry.delete_alias(owner, name, alias))


def _number(after: str) -> int:
    number = Reference.parse(after if "@" in after else f"@{after}").version
    if not isinstance(number, int):
        raise InvalidRequest(f"after is {after!r}; expected a version's id or number", param="after")
    return number


def _info(row: InterventionSummary) -> InterventionInfo:
    return InterventionInfo(
        name=row.name,
        latest=row.aliases.get(LATEST),
        versions=row.versions,
        aliases=row.aliases,
        created_at=row.created_at,
    )


def _version(published: PublishedVersion) -> InterventionVersion:
    row = published.row
    return InterventionVersion(
        id=published.id,
        name=published.name,
        version=row.version,
        content_hash=row.content_hash,
        bytes=row.bytes,
        parameters=row.parameters,
        manifest=row.manifest,
        created_at=row.created_at,
        job_id=row.job_id,
    )
