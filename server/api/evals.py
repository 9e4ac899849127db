"""/v1/evals in OpenAI's shape: data sets with criteria, and the runs that score models on them."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Query

from reftserve.client.schemas import (
    Deleted,
    Eval,
    EvalCreate,
    EvalOutputItem,
    EvalRun,
    EvalRunCreate,
    EvalRunStatus,
    InterventionUse,
    ItemSample,
    Page,
    TestingCriterion,
)
from reftserve.server.api.body_route import BodyRoute
from reftserve.server.api.dependencies import Evals, Owner
from reftserve.server.api.envelope import page
from reftserve.server.api.metadata_filter import WantedMetadata
from reftserve.server.errors import InvalidRequest
from reftserve.server.evaluation.eval_service import criteria_of
from reftserve.server.evaluation.tally import Tally
from reftserve.server.storage import tables
from reftserve.server.training.job_service import MAX_DIGITS

router = APIRouter(prefix="/v1/evals", tags=["evals"], route_class=BodyRoute)


@router.post("")
def create_eval(request: EvalCreate, evals: Evals, owner: Owner) -> Eval:
    """Create an eval: a data set and the criteria that its runs are compared by."""
    return _eval(evals.create(owner, request))


@router.get("")
def list_evals(
    evals: Evals,
    owner: Owner,
    metadata: WantedMetadata,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
    order_by: str = "created_at",
) -> Page[Eval]:
    """List evals, newest first unless `order` is `asc`. `metadata[key]=value` lists those with that metadata."""
    if order_by != "created_at":
        raise InvalidRequest(f"order_by is {order_by!r}; evals are listed by 'created_at' alone", param="order_by")
    rows, more = evals.list_page(owner, after=after, limit=limit, ascending=order == "asc", metadata=metadata)
    return page([_eval(row) for row in rows], [row.id for row in rows], has_more=more)


@router.get("/{eval_id}")
def get_eval(eval_id: str, evals: Evals, owner: Owner) -> Eval:
    """Return an eval with the scores of all its runs."""
    return _eval(evals.get(owner, eval_id))


@router.delete("/{eval_id}")
def delete_eval(eval_id: str, evals: Evals, owner: Owner) -> Deleted:
    """Delete an eval and its runs."""
    evals.delete(owner, eval_id)
    return Deleted(id=eval_id, object="eval.deleted")


@router.post("/{eval_id}/runs")
def create_run(eval_id: str, request: EvalRunCreate, evals: Evals, owner: Owner) -> EvalRun:
    """Score the base, an intervention or a composition, in the background."""
    run = evals.create_run(owner, eval_id, request)
    return _run(run, evals.criteria(owner, eval_id))


@router.get("/{eval_id}/runs")
def list_runs(
    eval_id: str,
    evals: Evals,
    owner: Owner,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=1000),
    order: Literal["asc", "desc"] = "asc",
    status: EvalRunStatus | None = None,
) -> Page[EvalRun]:
    """List runs of an eval, oldest first unless `order` is `desc`."""
    criteria = evals.criteria(owner, eval_id)
    rows, more = evals.list_runs(owner, eval_id, after=after, limit=limit, ascending=order == "asc", status=status)
    return page([_run(row, criteria) for row in rows], [row.id for row in rows], has_more=more)


@router.get("/{eval_id}/runs/{run_id}")
def get_run(eval_id: str, run_id: str, evals: Evals, owner: Owner) -> EvalRun:
    """Return a run with its scores so far."""
    run = evals.get_run(owner, eval_id, run_id)
    return _run(run, evals.criteria(owner, eval_id))


@router.post("/{eval_id}/runs/{run_id}/cancel")
def cancel_run(eval_id: str, run_id: str, evals: Evals, owner: Owner) -> EvalRun:
    """Stop a run; items that the engine is computing get no result."""
    run = evals.cancel_run(owner, eval_id, run_id)
    return _run(run, evals.criteria(owner, eval_id))


@router.delete("/{eval_id}/runs/{run_id}")
def delete_run(eval_id: str, run_id: str, evals: Evals, owner: Owner) -> Deleted:
    """Delete a run and its items."""
    evals.delete_run(owner, eval_id, run_id)
    return Deleted(id=run_id, object="eval.run.deleted")


@router.get("/{eval_id}/runs/{run_id}/output_items")
def list_output_items(
    eval_id: str,
    run_id: str,
    evals: Evals,
    owner: Owner,
    after: str | None = None,
    status: Literal["pass", "fail", "error"] | None = None,
    limit: int = Query(20, ge=1, le=1000),
) -> Page[EvalOutputItem]:
    """List the results of each item, in the order of the data set."""
    number = -1 if after is None else _number(after, run_id)
    rows, more = evals.items(owner, eval_id, run_id, after=number, status=status, limit=limit)
    items = [_item(eval_id, row) for row in rows]
    return page(items, [item.id for item in items], has_more=more)


def _eval(row: tables.Eval) -> Eval:
    criteria = criteria_of(row)
    return Eval(
        id=row.id,
        name=row.name,
        created_at=row.created_at,
        data_source_config={"type": "file", "file_id": row.file_id},
        testing_criteria=[criterion.model_dump(exclude_none=True) for criterion in criteria],
        metadata=row.eval_metadata,
        runs=[_run(run, criteria) for run in row.runs],
    )


def _run(run: tables.EvalRun, criteria: list[TestingCriterion]) -> EvalRun:
    tally = Tally.model_validate(run.tally)
    return EvalRun(
        id=run.id,
        eval_id=run.eval_id,
        name=run.name,
        model=run.data_source["model"],
        interventions=[InterventionUse.model_validate(use) for use in run.uses],
        status=run.status,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
        data_source=run.data_source,
        result_counts=tally.counts(run.total),
        per_testing_criteria_results=tally.results(criteria),
        error=run.error,
        metadata=run.run_metadata,
    )


def _item(eval_id: str, row: tables.EvalItem) -> EvalOutputItem:
    return EvalOutputItem(
        id=f"{_item_prefix(row.run_id)}{row.number}",
        created_at=row.created_at,
        eval_id=eval_id,
        run_id=row.run_id,
        datasource_item_id=row.number,
        status=row.status,
        results=row.results,
        sample=ItemSample(output=row.output, error=row.error),
    )


def _number(item_id: str, run_id: str) -> int:
    number = item_id.removeprefix(_item_prefix(run_id))
    if number == item_id or not number.isdecimal() or len(number) > MAX_DIGITS:
        raise InvalidRequest(f"{item_id!r} is no item of run {run_id}; expected an output item's id", param="after")
    return int(number)


def _item_prefix(run_id: str) -> str:
    return f"outputitem_{run_id.removeprefix('evalrun_')}_"
