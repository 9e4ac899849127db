"""Query parameters of lists that OpenAI's client has are followed, or refused with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from reftserve.server.api import auth, evals, fine_tuning
from reftserve.server.api.error_responses import install_error_handlers
from reftserve.server.storage.tables import JobCheckpoint

ROWS = [JobCheckpoint(job_id="ftjob-1", step=step, metrics={"step": step}, created_at=1) for step in (30, 20, 10)]
CHECKPOINTS = "/v1/fine_tuning/jobs/ftjob-1/checkpoints"


@pytest.fixture
def http() -> TestClient:
    def listed(owner: str, *, metadata: dict[str, str], **_: Any) -> tuple[list[Any], bool]:
        assert metadata == {}
        return [], False

    app = FastAPI()
    jobs = SimpleNamespace(checkpoints=lambda owner, job_id: ROWS, list_page=listed)
    app.state.services = SimpleNamespace(jobs=jobs, evals=SimpleNamespace(list_page=listed))
    app.dependency_overrides[auth.owner] = lambda: "owner"
    app.include_router(fine_tuning.router)
    app.include_router(evals.router)
    install_error_handlers(app)
    return TestClient(app)


@pytest.mark.parametrize(
    ("query", "steps", "more"),
    [("", [30, 20, 10], False), ("?limit=2", [30, 20], True), ("?limit=2&after=ftckpt-1-20", [10], False)],
)
def test_checkpoints_come_in_pages(http: TestClient, query: str, steps: list[int], more: bool) -> None:
    found = http.get(CHECKPOINTS + query).json()
    assert [checkpoint["step_number"] for checkpoint in found["data"]] == steps
    assert found["has_more"] is more


def test_a_page_behind_an_unknown_checkpoint_is_refused(http: TestClient) -> None:
    answer = http.get(f"{CHECKPOINTS}?after=ftckpt-2-20")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


def test_evals_are_ordered_by_their_creation_alone(http: TestClient) -> None:
    assert http.get("/v1/evals?order_by=created_at").status_code == 200
    answer = http.get("/v1/evals?order_by=updated_at")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "order_by")


@pytest.mark.parametrize("path", ["/v1/evals", "/v1/fine_tuning/jobs"])
def test_null_metadata_is_not_given(http: TestClient, path: str) -> None:
    assert http.get(f"{path}?metadata=null").status_code == 200
