"""Pages of jobs and evals: each is one query along an index, in both orders, with filters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy

from reftserve.server.errors import NotFound
from reftserve.server.evaluation.eval_service import EvalService
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Eval, EvalRun, Job
from reftserve.server.training.job_service import JobService

OWNER, OTHER = "default", "other"
ODD = 'it\'s "odd".[0] $%'


@pytest.fixture
def database(database_url: str) -> Database:
    found = Database(database_url)
    found.migrate()
    return found


@pytest.fixture
def jobs(database: Database) -> JobService:
    return JobService(SimpleNamespace(database=database), SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


@pytest.fixture
def evals(database: Database) -> EvalService:
    store: Any = SimpleNamespace(database=database)
    return EvalService(store, SimpleNamespace(), lambda: None, max_interventions=1)  # type: ignore[arg-type, return-value]


def job(number: int, owner: str = OWNER, created_at: int | None = None, **metadata: str) -> Job:
    return Job(
        id=f"ftjob-{number:04}",
        owner=owner,
        status="succeeded",
        model="m",
        training_file="file-1",
        suffix="tone",
        plan={"filler": "x" * 1000},
        seed=0,
        job_metadata=metadata or None,
        result_files=[],
        created_at=number if created_at is None else created_at,
    )


def add(database: Database, *rows: Any) -> None:
    with database.session() as session:
        session.add_all(rows)


def all_pages(jobs: JobService, **options: Any) -> list[str]:
    found: list[str] = []
    more = True
    while more:
        page, more = jobs.list_page(OWNER, after=found[-1] if found else None, limit=3, **options)
        found += [row.id for row in page]
    return found


def test_pages_hold_every_job_of_the_owner_once_in_order(database: Database, jobs: JobService) -> None:
    # Several jobs in one second: their ids order them.
    add(database, *(job(n, created_at=n // 4) for n in range(20)), *(job(100 + n, OTHER, 2) for n in range(5)))
    newest_first = [f"ftjob-{n:04}" for n in reversed(range(20))]
    assert all_pages(jobs) == newest_first
    assert all_pages(jobs, ascending=True) == newest_first[::-1]


def test_a_page_after_a_job_of_another_owner_is_refused(database: Database, jobs: JobService) -> None:
    add(database, job(1), job(2, OTHER))
    for unknown in ("ftjob-0002", "ftjob-x"):
        with pytest.raises(NotFound):
            jobs.list_page(OWNER, after=unknown, limit=3)


@pytest.mark.parametrize("key", ["team", ODD, "a.b", "größe"])
def test_jobs_are_filtered_by_metadata(database: Database, jobs: JobService, key: str) -> None:
    add(database, *(job(n, **({key: ODD if n % 2 else "b", "all": "1"} if n < 8 else {})) for n in range(10)))
    assert all_pages(jobs, metadata={key: ODD}) == [f"ftjob-{n:04}" for n in (7, 5, 3, 1)]
    assert all_pages(jobs, metadata={key: "b", "all": "1"}) == [f"ftjob-{n:04}" for n in (6, 4, 2, 0)]
    assert all_pages(jobs, metadata={key: "c"}) == all_pages(jobs, metadata={"absent": "b"}) == []


def test_evals_and_their_runs_have_pages_too(database: Database, evals: EvalService) -> None:
    common: dict[str, Any] = {"owner": OWNER, "created_at": 0}
    made = [
        Eval(id=f"eval_{n}", name="e", file_id="f", criteria=[], eval_metadata={"n": str(n % 2)}, **common)
        for n in range(5)
    ]
    runs = [
        EvalRun(
            id=f"evalrun_{n}",
            eval_id="eval_1",
            name="r",
            status="queued" if n % 2 else "failed",
            data_source={},
            uses=[],
            total=0,
            tally={},
            **common,
        )
        for n in range(5)
    ]
    add(database, *made, *runs)
    page, more = evals.list_page(OWNER, after="eval_4", limit=2)
    assert ([row.id for row in page], more) == (["eval_3", "eval_2"], True)
    page, more = evals.list_page(OWNER, after=None, limit=9, ascending=True, metadata={"n": "1"})
    assert ([row.id for row in page], more) == (["eval_1", "eval_3"], False)
    assert [run.id for run in page[0].runs] == [run.id for run in runs]
    listed, more = evals.list_runs(OWNER, "eval_1", after="evalrun_0", limit=1, status="queued")
    assert ([run.id for run in listed], more) == (["evalrun_1"], True)


def test_a_page_reads_no_more_rows_of_many_jobs_than_of_few(database: Database, jobs: JobService) -> None:
    loaded: list[Job] = []
    statements: list[tuple[str, Any]] = []
    add(database, *(job(n) for n in range(2000)))
    sqlalchemy.event.listen(Job, "load", lambda target, _: loaded.append(target))
    sqlalchemy.event.listen(
        database.reader, "before_cursor_execute", lambda c, cursor, sql, values, *_: statements.append((sql, values))
    )
    page, more = jobs.list_page(OWNER, after="ftjob-1000", limit=20)
    assert (len(page), more) == (20, True)
    assert len(loaded) == 22, "the page, the job before it and the one behind it"
    if database.url.get_backend_name() == "sqlite":
        sql, values = next(each for each in statements if "ORDER BY" in each[0])
        with database.reader.connect() as connection:
            plan = " ".join(str(row) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values))
        assert "ix_jobs_owner_created_at_id" in plan
        assert "TEMP B-TREE" not in plan
