"""Leases: each job has one worker at a time, and a worker presumed dead can write nothing more."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from reftserve.server.storage.database import Database
from reftserve.server.storage.leases import Lease, LeaseLost, Leases, worker_id
from reftserve.server.storage.tables import EvalRun, Job
from reftserve.server.training.job_repository import JobRepository

LONG_S, SHORT_S = 60.0, 0.05


@pytest.fixture
def database(database_url: str) -> Database:
    found = Database(database_url)
    found.migrate()
    return found


@pytest.fixture
def log(database: Database) -> JobRepository:
    return JobRepository(database)


def add_job(log: JobRepository, number: int = 0, status: str = "queued") -> str:
    job = Job(
        id=f"ftjob-{number:03}",
        owner="default",
        status=status,
        model="m",
        training_file="file-1",
        suffix="tone",
        plan={},
        seed=0,
        result_files=[],
        created_at=number,
    )
    log.create(job, "Created")
    return job.id


def test_many_workers_take_each_job_once_in_order_of_age(database: Database, log: JobRepository) -> None:
    jobs = [add_job(log, number) for number in range(12)]
    taken: list[list[str]] = [[] for _ in range(4)]

    def work(mine: list[str]) -> None:
        leases = Leases(database, Job, worker_id(), lease_s=LONG_S)
        while (lease := leases.take()) is not None:
            mine.append(lease.id)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(job for mine in taken for job in mine) == Counter(jobs)
    assert all(mine == sorted(mine) for mine in taken)


@pytest.mark.parametrize("status", ["paused", "succeeded", "failed", "cancelled"])
def test_a_paused_or_ended_job_is_not_taken(database: Database, log: JobRepository, status: str) -> None:
    add_job(log, status=status)
    assert Leases(database, Job, "a", lease_s=LONG_S).take() is None


WRITES: dict[str, Callable[[JobRepository, Lease[Job]], object]] = {
    "an event": lambda log, lease: log.event(lease, "late"),
    "progress": lambda log, lease: log.progress(lease, "late", {"step": 1}, estimated_finish=1),
    "a checkpoint": lambda log, lease: log.checkpoint(lease, 1, "jobs/late", {}, {}),
    "a pause": lambda log, lease: log.pause(lease, "late"),
    "the end": lambda log, lease: log.end(lease, "failed", "late", error={"code": "late"}),
    "the poll": lambda log, lease: log.pause_requested(lease),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_worker_presumed_dead_can_write_nothing(
    database: Database, log: JobRepository, write: Callable[[JobRepository, Lease[Job]], object]
) -> None:
    job_id = add_job(log)
    slow, live = (Leases(database, Job, name, lease_s=SHORT_S) for name in ("slow", "live"))
    old = slow.take()
    assert old is not None
    time.sleep(2 * SHORT_S)
    new = live.take()
    assert new is not None
    assert (new.id, new.fence > old.fence) == (job_id, True)
    with pytest.raises(LeaseLost, match=r"lease on .* is lost"):
        write(log, old)
    assert [event.message for event in log.events(job_id, before=None, limit=9)] == ["Created"]
    assert log.checkpoints(job_id) == []
    assert (log.get(job_id).status, log.get(job_id).lease_worker) == ("running", "live")
    write(log, new)


def test_a_worker_that_renews_its_lease_keeps_its_job(database: Database, log: JobRepository) -> None:
    add_job(log)
    busy, other = (Leases(database, Job, name, lease_s=1) for name in ("busy", "other"))
    lease = busy.take()
    assert lease is not None
    for _ in range(6):
        time.sleep(0.25)
        busy.renew()
        assert other.take() is None
    log.event(lease, "still mine")


def test_a_worker_that_shuts_down_cleanly_frees_its_job_at_once(database: Database, log: JobRepository) -> None:
    add_job(log)
    leaving, other = (Leases(database, Job, name, lease_s=LONG_S) for name in ("leaving", "other"))
    lease = leaving.take()
    assert lease is not None
    leaving.release()
    taken = other.take()
    assert taken is not None
    assert taken.attempt == lease.attempt, "leaving is no failed attempt"
    with pytest.raises(LeaseLost):
        log.event(lease, "late")


def test_only_the_last_two_checkpoints_keep_files_and_a_checkpoint_resets_the_attempts(
    database: Database, log: JobRepository
) -> None:
    job_id = add_job(log)
    leases = Leases(database, Job, "a", lease_s=LONG_S)
    lease = leases.take()
    assert lease is not None
    assert [log.checkpoint(lease, step, f"jobs/{step}", {}, {}) for step in (4, 8, 12)] == [[], [], ["jobs/4"]]
    assert [(row.step, row.kept) for row in log.checkpoints(job_id)] == [(12, True), (8, True), (4, False)]
    assert log.checkpoint(lease, 12, "jobs/12-again", {}, {}) == ["jobs/12"]
    assert [(row.path, row.kept) for row in log.checkpoints(job_id)][:2] == [("jobs/12-again", True), ("jobs/8", True)]
    assert log.get(job_id).attempts == 0


def test_an_idle_process_waits_for_no_writer(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    for table in (Job, EvalRun):
        idle: Leases[Any] = Leases(database, table, worker_id(), lease_s=LONG_S)
        with database.session() as writer:
            writer.execute(text("SELECT 1"))
            # One that waits gets an error: the writer ends after it.
            assert idle.take() is None
            idle.renew()


def test_a_job_whose_files_are_not_checked_yet_keeps_its_status_when_taken(
    database: Database, log: JobRepository
) -> None:
    job_id = add_job(log, status="validating_files")
    lease = Leases(database, Job, worker_id(), lease_s=LONG_S).take()
    assert lease is not None
    assert (lease.id, log.get(job_id).status) == (job_id, "validating_files")
