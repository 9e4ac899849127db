"""The evals of the API and their runs. A run exists once its row is committed as `queued`, also after a restart."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping

from pydantic import TypeAdapter
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.orm.interfaces import ORMOption

from reftserve.client.schemas import EvalCreate, EvalRunCreate, TestingCriterion
from reftserve.interventions.intervention_errors import FingerprintMismatch
from reftserve.server.base.folder import Base
from reftserve.server.datasets import read_examples
from reftserve.server.datasets.file_store import TRAINING
from reftserve.server.errors import Conflict, InvalidRequest, NotFound
from reftserve.server.evaluation.criteria import check_criteria
from reftserve.server.evaluation.serving_fingerprint import ServingFingerprint
from reftserve.server.evaluation.tally import Tally
from reftserve.server.registry.composition import resolve_composition
from reftserve.server.registry.store import Store
from reftserve.server.storage.leases import release_lease
from reftserve.server.storage.pages import has_metadata, read_page
from reftserve.server.storage.tables import Eval, EvalItem, EvalRun

_CRITERIA: TypeAdapter[list[TestingCriterion]] = TypeAdapter(list[TestingCriterion])


def criteria_of(row: Eval) -> list[TestingCriterion]:
    """Return an eval's criteria, with names and labels filled in."""
    return _CRITERIA.validate_python(row.criteria)


class EvalService:
    """The evals of all owners and their runs. served: returns the engine's fingerprint, or raises Unavailable."""

    def __init__(
        self, store: Store, base: Base, served: Callable[[], ServingFingerprint], *, max_interventions: int
    ) -> None:
        self._store = store
        self._base = base
        self._served = served
        self._max_interventions = max_interventions

    def create(self, owner: str, request: EvalCreate) -> Eval:
        """Check criteria and data set, and store the eval. Raises InvalidRequest or NotFound with the field's name."""
        file_id = request.data_source_config.file_id
        file = self._store.files.get(owner, file_id, param="data_source_config.file_id")
        if file.purpose != TRAINING:
            raise InvalidRequest(
                f"file {file_id} has purpose {file.purpose!r}; expected {TRAINING!r}, a data set",
                param="data_source_config.file_id",
                code="invalid_file",
            )
        path = self._store.files.path(file)
        criteria = check_criteria(request.testing_criteria, lambda: [each.target for each in read_examples(path)])
        identity = _identity("eval")
        row = Eval(
            id=identity,
            owner=owner,
            name=request.name or file.filename,
            file_id=file_id,
            criteria=_CRITERIA.dump_python(criteria, mode="json"),
            eval_metadata=request.metadata,
            created_at=int(time.time()),
        )
        with self._store.database.session() as session:
            session.add(row)
        return self.get(owner, identity)

    def get(self, owner: str, eval_id: str) -> Eval:
        """Return one eval with its runs, oldest first. Raises NotFound."""
        return self._get(owner, eval_id, selectinload(Eval.runs))

    def criteria(self, owner: str, eval_id: str) -> list[TestingCriterion]:
        """Return an eval's criteria. Raises NotFound."""
        return criteria_of(self._get(owner, eval_id))

    def list_page(
        self, owner: str, *, after: str | None, limit: int, ascending: bool = False, metadata: Mapping[str, str] = {}
    ) -> tuple[list[Eval], bool]:
        """Return evals with their runs, from the one after eval `after`, and whether more follow. Raises NotFound.

        The newest comes first unless `ascending`. metadata: entries that the evals must have.
        """
        place = None if after is None else (self._get(owner, after).id,)
        with self._store.database.reading() as session:
            query = select(Eval).where(Eval.owner == owner, *has_metadata(session, Eval.eval_metadata, metadata))
            query = query.options(selectinload(Eval.runs))
            return read_page(session, query, (Eval.id,), after=place, limit=limit, ascending=ascending)

    def list_runs(
        self,
        owner: str,
        eval_id: str,
        *,
        after: str | None,
        limit: int,
        ascending: bool = True,
        status: str | None = None,
    ) -> tuple[list[EvalRun], bool]:
        """Return runs of an eval, from the one after run `after`, and whether more follow. Raises NotFound.

        The oldest comes first if `ascending`. status: only runs with this status.
        """
        place = None if after is None else (self.get_run(owner, eval_id, after).id,)
        query = select(EvalRun).where(EvalRun.owner == owner, EvalRun.eval_id == eval_id)
        if status is not None:
            query = query.where(EvalRun.status == status)
        with self._store.database.reading() as session:
            return read_page(session, query, (EvalRun.id,), after=place, limit=limit, ascending=ascending)

    def delete(self, owner: str, eval_id: str) -> None:
        """Delete an eval with its runs. A run in progress stops. Raises NotFound."""
        with self._store.database.session(may_use_reserve=True) as session:
            # Locked: of two deletions at once the second finds nothing.
            row = session.get(Eval, eval_id, with_for_update=True)
            if row is None or row.owner != owner:
                raise _no_eval(eval_id)
            session.delete(row)

    def create_run(self, owner: str, eval_id: str, request: EvalRunCreate) -> EvalRun:
        """Queue a run of the current versions. Raises InvalidRequest, NotFound, or Unavailable without an engine."""
        row = self._get(owner, eval_id)
        file = self._store.files.get(owner, row.file_id, param="eval_id")
        source = request.data_source
        versions = resolve_composition(
            self._store.interventions,
            owner,
            source.model,
            source.interventions,
            base=self._base.name,
            limit=self._max_interventions,
        )
        uses = [{"name": v.name, "version": v.row.version, "scale": scale} for v, scale in versions]
        run = EvalRun(
            id=_identity("evalrun"),
            owner=owner,
            eval_id=eval_id,
            name=request.name or (" + ".join(map(_label, uses)) or self._base.name),
            status="queued",
            data_source=source.model_dump(mode="json", exclude_none=True),
            uses=uses,
            served=self._served().model_dump(),
            total=file.examples or 0,
            tally=Tally().model_dump(),
            run_metadata=request.metadata,
            created_at=int(time.time()),
        )
        with self._store.database.session() as session:
            session.add(run)
        return run

    def get_run(self, owner: str, eval_id: str, run_id: str) -> EvalRun:
        """Return one run. Raises NotFound."""
        with self._store.database.reading() as session:
            run = session.get(EvalRun, run_id)
        return _require_run(run, owner, eval_id, run_id)

    def require_served(self, run: EvalRun) -> None:
        """Raise Conflict if the engine's fingerprint has changed since the run's creation: all items must share one."""
        if run.served is None:
            return  # made before runs recorded it
        try:
            self._served().require(ServingFingerprint(**run.served))
        except FingerprintMismatch as cause:
            raise Conflict(
                f"the run was made for another base than the current {self._base.name!r}: {cause}", code=cause.code
            ) from cause

    def cancel_run(self, owner: str, eval_id: str, run_id: str) -> EvalRun:
        """Cancel a run; the engine drops its current items. Raises NotFound, or Conflict if the run has ended."""
        with self._store.database.session(may_use_reserve=True) as session:
            run = _locked_run(session, owner, eval_id, run_id)
            if run.status in EvalRun.ENDED:
                raise Conflict(f"run {run_id} is {run.status} and cannot be canceled", code="eval_run_ended")
            release_lease(run)
            run.status = "canceled"
            run.finished_at = int(time.time())
        return run

    def delete_run(self, owner: str, eval_id: str, run_id: str) -> None:
        """Delete a run with its items. A run in progress stops. Raises NotFound."""
        with self._store.database.session(may_use_reserve=True) as session:
            session.delete(_locked_run(session, owner, eval_id, run_id))

    def items(
        self, owner: str, eval_id: str, run_id: str, *, after: int, status: str | None, limit: int
    ) -> tuple[list[EvalItem], bool]:
        """Return items of a run, in the data set's order, after number `after`, and whether more follow."""
        self.get_run(owner, eval_id, run_id)
        query = select(EvalItem).where(EvalItem.run_id == run_id, EvalItem.number > after)
        if status is not None:
            query = query.where(EvalItem.status == status)
        with self._store.database.reading() as session:
            rows = list(session.scalars(query.order_by(EvalItem.number).limit(limit + 1)))
        return rows[:limit], len(rows) > limit

    def _get(self, owner: str, eval_id: str, *options: ORMOption) -> Eval:
        query = select(Eval).where(Eval.id == eval_id, Eval.owner == owner).options(*options)
        with self._store.database.reading() as session:
            row = session.scalar(query)
        if row is None:
            raise _no_eval(eval_id)
        return row


def _no_eval(eval_id: str) -> NotFound:
    return NotFound(f"no eval {eval_id!r}", param="eval_id", code="eval_not_found")


def _locked_run(session: Session, owner: str, eval_id: str, run_id: str) -> EvalRun:
    return _require_run(session.get(EvalRun, run_id, with_for_update=True), owner, eval_id, run_id)


def _require_run(run: EvalRun | None, owner: str, eval_id: str, run_id: str) -> EvalRun:
    if run is None or run.owner != owner or run.eval_id != eval_id:
        raise NotFound(f"no run {run_id!r} of eval {eval_id!r}", param="run_id", code="eval_run_not_found")
    return run


def _identity(prefix: str) -> str:
    # Ids sort by creation.
    return f"{prefix}_{time.time_ns():016x}{secrets.token_hex(8)}"


def _label(use: dict[str, object]) -> str:
    scale = "" if use["scale"] == 1.0 else f"*{use['scale']}"
    return f"{use['name']}@{use['version']}{scale}"
