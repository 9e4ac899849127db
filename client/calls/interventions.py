"""Calls for published interventions, and the zip format of their artifacts."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx

from reftserve.client.calls.call import Call, Upload, given, one
from reftserve.client.schemas import Deleted, InterventionHistory, InterventionInfo, InterventionVersion, Page

ARTIFACT_FILES = ("manifest.json", "edits.safetensors")
HISTORY_FILE = "history.json"
PAGE = 100


def list_interventions(after: str | None) -> Call[Page[InterventionInfo]]:
    """GET /v1/interventions: the page behind the name `after`."""
    return Call("GET", "/v1/interventions", one(Page[InterventionInfo]), params=given({"after": after, "limit": PAGE}))


def list_versions(name: str, after: str | None) -> Call[Page[InterventionVersion]]:
    """GET /v1/interventions/{name}/versions: the page behind the version with id `after`."""
    params = given({"after": after, "limit": PAGE})
    return Call("GET", f"/v1/interventions/{name}/versions", one(Page[InterventionVersion]), params=params)


def get_intervention(name: str) -> Call[InterventionInfo]:
    """GET /v1/interventions/{name}."""
    return Call("GET", f"/v1/interventions/{name}", one(InterventionInfo))


def get_version(name: str, version: int | str) -> Call[InterventionVersion]:
    """GET /v1/interventions/{name}/versions/{version}."""
    return Call("GET", f"/v1/interventions/{name}/versions/{version}", one(InterventionVersion))


def get_history(name: str, version: int | str) -> Call[InterventionHistory]:
    """GET /v1/interventions/{name}/versions/{version}/history."""
    return Call("GET", f"/v1/interventions/{name}/versions/{version}/history", one(InterventionHistory))


def upload_intervention(name: str, artifact: str | Path) -> Call[InterventionVersion]:
    """POST /v1/interventions. artifact: a folder as `download_intervention` writes it, or a zip of that folder."""
    path = Path(artifact)
    upload = Upload(f"{name}.zip", _zipped(path) if path.is_dir() else path)
    return Call("POST", "/v1/interventions", one(InterventionVersion), form={"name": name}, upload=upload)


def download_intervention(name: str, version: int | str, folder: str | Path) -> Call[Path]:
    """GET /v1/interventions/{name}/versions/{version}/content; its reader unzips into `folder` and creates that."""

    def unzip(response: httpx.Response) -> Path:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            for member in (*ARTIFACT_FILES, *({HISTORY_FILE} & set(archive.namelist()))):
                (target / member).write_bytes(archive.read(member))
        return target

    return Call("GET", f"/v1/interventions/{name}/versions/{version}/content", unzip)


def delete_intervention(name: str, version: int | str | None, *, force: bool) -> Call[Deleted]:
    """DELETE /v1/interventions/{name}, or one version of it."""
    path = f"/v1/interventions/{name}" + ("" if version is None else f"/versions/{version}")
    return Call("DELETE", path, one(Deleted), params={"force": force})


def set_alias(name: str, alias: str, version: int) -> Call[InterventionInfo]:
    """PUT /v1/interventions/{name}/aliases/{alias}."""
    return Call("PUT", f"/v1/interventions/{name}/aliases/{alias}", one(InterventionInfo), json={"version": version})


def delete_alias(name: str, alias: str) -> Call[InterventionInfo]:
    """DELETE /v1/interventions/{name}/aliases/{alias}."""
    return Call("DELETE", f"/v1/interventions/{name}/aliases/{alias}", one(InterventionInfo))


def _zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ARTIFACT_FILES:
            archive.write(folder / name, name)
        if (folder / HISTORY_FILE).exists():
            archive.write(folder / HISTORY_FILE, HISTORY_FILE)
    return buffer.getvalue()
