"""`/` and `/v1`: where the rest of the API is."""

from __future__ import annotations

from fastapi import APIRouter, Request

from reftserve.client.schemas import Index
from reftserve.server.api.dependencies import BaseInfo

router = APIRouter(tags=["index"])


@router.get("/")
@router.get("/v1")
async def index(request: Request, base: BaseInfo) -> Index:
    """Say which server this is and where its API and documentation are."""
    root = request.scope.get("root_path", "")
    return Index(
        name="ReftServe",
        version=request.app.version,
        model=base.name,
        api=f"{root}/v1",
        documentation=f"{root}/docs",
        openapi=f"{root}/openapi.json",
    )
