"""DBOS as the engine of durable jobs: what is configured, and why.

Executor id and application version are constants, so that a restarted worker recovers its predecessor's jobs, also
after an upgrade. Everything stored is JSON. DBOS would unpickle a row that says it is pickled, whatever serializer is
configured; nothing here ever writes such a row, so one that appears is not ours, and is refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from dbos import DBOS, DBOSConfig, Serializer
from dbos import _serialization as dbos_serialization

from reftserve.server.settings import Settings

WORKFLOW = "train"
QUEUE = "training"
EXECUTOR = "worker"
APPLICATION_VERSION = "1"
MAX_RECOVERIES = 1000


class JsonSerializer(Serializer):
    """Workflow inputs and step results as JSON; exceptions as their text."""

    def serialize(self, data: Any) -> str:
        """To JSON."""
        return json.dumps(data, default=repr)

    def deserialize(self, serialized_data: str) -> Any:
        """From JSON."""
        return json.loads(serialized_data)

    def name(self) -> str:
        """What rows say of themselves."""
        return "reftserve_json"


def configure(settings: Settings) -> DBOS:
    """The process's DBOS, not launched yet: workflows and queues are registered first."""
    _refuse_pickles()
    url = settings.database_url
    config = DBOSConfig(
        name="reftserve",
        system_database_url=url if url and not url.startswith("sqlite") else _sqlite_url(settings),
        serializer=JsonSerializer(),
        executor_id=EXECUTOR,
        application_version=APPLICATION_VERSION,
        log_level="WARNING",
    )
    return DBOS(config=config)


def _sqlite_url(settings: Settings) -> str:
    return f"sqlite:///{settings.data.resolve() / 'jobs.db'}"


def _refuse_pickles() -> None:
    def refuse(self: Any, serialized_data: str) -> NoReturn:
        raise TypeError("a row of the jobs' database says that it is pickled; pickles are never read")

    dbos_serialization.DefaultSerializer.deserialize = refuse  # type: ignore[method-assign, assignment]
