"""The database: migrations create exactly the declared tables; committed rows survive kill -9."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text

from reftserve.server.storage import migrations
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Eval, Intervention, Job, Table

INSERT = """
import os, signal, sys
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Intervention
database = Database(sys.argv[1])
database.migrate()
for number in range(100):
    with database.session() as session:
        session.add(Intervention(owner="o", name=f"n{number}", next_version=1, created_at=0))
    print(number, flush=True)
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


def alembic_config(database: Database) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["engine"] = database.engine
    return config


def test_migrations_make_the_declared_tables(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.migrate()
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_an_upgrade_keeps_jobs_and_ends_those_in_cancellation(url: str) -> None:
    database = Database(url)
    config = alembic_config(database)
    command.upgrade(config, "0001")
    old = (
        "INSERT INTO jobs (id, owner, status, model, training_file, suffix, plan, seed, cancel_requested, result_files,"
        " created_at) VALUES (:id, 'o', 'running', 'm', 'f', 's', '{}', 0, :cancel_requested, '[]', 0)"
    )
    with database.engine.begin() as connection:
        for job_id, cancel_requested in (("going", False), ("stopping", True)):
            connection.execute(text(old), {"id": job_id, "cancel_requested": cancel_requested})
    database.migrate()
    with database.reading() as session:
        found = {job.id: (job.status, job.pause_requested, job.fence) for job in session.scalars(select(Job))}
    assert found == {"going": ("running", False, 0), "stopping": ("cancelled", False, 0)}


def test_an_upgrade_keeps_the_meaning_of_exact_matches(url: str) -> None:
    database = Database(url)
    config = alembic_config(database)
    command.upgrade(config, "0004_evals")
    old = "INSERT INTO evals (id, owner, name, file_id, criteria, created_at) VALUES ('e', 'o', 'n', 'f', :criteria, 0)"
    criteria = [{"type": "exact_match", "name": "exact_match"}, {"type": "f1", "name": "f1"}]
    with database.engine.begin() as connection:
        connection.execute(text(old), {"criteria": json.dumps(criteria)})
    database.migrate()
    with database.reading() as session:
        assert session.get_one(Eval, "e").criteria == [{**criteria[0], "normalize": "squad"}, criteria[1]]
    command.downgrade(config, "0004_evals")
    with database.engine.connect() as connection:
        assert json.loads(connection.execute(text("SELECT criteria FROM evals")).scalar_one()) == criteria


def test_committed_rows_survive_kill_9(url: str) -> None:
    done = subprocess.run([sys.executable, "-c", INSERT, url], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == "30"
    with Database(url).reading() as session:
        assert len(list(session.scalars(select(Intervention)))) == 31


def test_a_failed_transaction_leaves_nothing(url: str) -> None:
    database = Database(url)
    database.migrate()

    def fail_on_the_way() -> None:
        with database.session() as session:
            session.add(Intervention(owner="o", name="n", next_version=1, created_at=0))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_on_the_way()
    with database.reading() as session:
        assert not list(session.scalars(select(Intervention)))


def test_a_missing_database_is_reported_as_unreachable(tmp_path: Path) -> None:
    assert not Database(f"sqlite:///{tmp_path / 'no' / 'folder' / 'test.db'}").is_reachable()


def test_json_with_half_a_surrogate_pair_or_nul_can_be_read(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    metadata = {"a\ud800": "\udc00b", "NUL": "\0", "pair": "\U0001f600", "plain": "\\ud800"}
    with database.session() as session:
        session.add(Eval(id="e", owner="o", name="n", file_id="f", criteria=[], eval_metadata=metadata, created_at=0))
    with database.reading() as session:
        read = session.get_one(Eval, "e").eval_metadata
    assert read == {"a\ufffd": "\ufffdb", "NUL": "\0", "pair": "\U0001f600", "plain": "\\ud800"}
    database.close()
