"""Calls for evals, their runs and the items of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reftserve.client.calls.call import Call, given, listed, one
from reftserve.client.calls.generation import Composition, composed
from reftserve.client.schemas import Deleted, Eval, EvalOutputItem, EvalRun, Page

Criteria = Sequence[str | Mapping[str, Any]]
ItemStatus = Literal["pass", "fail", "error"]


def create_eval(
    file_id: str, criteria: Criteria, *, name: str | None, metadata: Mapping[str, str] | None
) -> Call[Eval]:
    """POST /v1/evals."""
    body = {
        "name": name,
        "data_source_config": {"type": "file", "file_id": file_id},
        "testing_criteria": [{"type": each} if isinstance(each, str) else dict(each) for each in criteria],
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", "/v1/evals", one(Eval), json=given(body))


def list_evals(after: str | None, limit: int) -> Call[list[Eval]]:
    """GET /v1/evals, newest first."""
    return Call("GET", "/v1/evals", listed(Page[Eval]), params=given({"after": after, "limit": limit}))


def get_eval(eval_id: str) -> Call[Eval]:
    """GET /v1/evals/{id}."""
    return Call("GET", f"/v1/evals/{eval_id}", one(Eval))


def delete_eval(eval_id: str) -> Call[Deleted]:
    """DELETE /v1/evals/{id}."""
    return Call("DELETE", f"/v1/evals/{eval_id}", one(Deleted))


def create_run(
    eval_id: str,
    model: str,
    interventions: Composition | None,
    *,
    name: str | None,
    max_tokens: int | None,
    metadata: Mapping[str, str] | None,
) -> Call[EvalRun]:
    """POST /v1/evals/{id}/runs."""
    source = {
        "type": "completions",
        "model": model,
        "interventions": None if interventions is None else composed(interventions),
        "sampling_params": None if max_tokens is None else {"max_completion_tokens": max_tokens},
    }
    body = {
        "name": name,
        "data_source": given(source),
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", f"/v1/evals/{eval_id}/runs", one(EvalRun), json=given(body))


def get_run(eval_id: str, run_id: str) -> Call[EvalRun]:
    """GET /v1/evals/{id}/runs/{id}."""
    return Call("GET", f"/v1/evals/{eval_id}/runs/{run_id}", one(EvalRun))


def cancel_run(eval_id: str, run_id: str) -> Call[EvalRun]:
    """POST /v1/evals/{id}/runs/{id}/cancel."""
    return Call("POST", f"/v1/evals/{eval_id}/runs/{run_id}/cancel", one(EvalRun))


def delete_run(eval_id: str, run_id: str) -> Call[Deleted]:
    """DELETE /v1/evals/{id}/runs/{id}."""
    return Call("DELETE", f"/v1/evals/{eval_id}/runs/{run_id}", one(Deleted))


def list_items(
    eval_id: str, run_id: str, *, status: ItemStatus | None, after: str | None, limit: int
) -> Call[Page[EvalOutputItem]]:
    """GET /v1/evals/{id}/runs/{id}/output_items, in the order of the data set."""
    path = f"/v1/evals/{eval_id}/runs/{run_id}/output_items"
    params = given({"status": status, "after": after, "limit": limit})
    return Call("GET", path, one(Page[EvalOutputItem]), params=params)
