"""Publishing, deleting and aliases take turns on an intervention; pins wait for none of them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from published import BASE, OWNER, make_artifact

from reftserve.server.datasets.file_store import FileStore
from reftserve.server.errors import Conflict, NotFound
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.registry.names import Reference
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3
BLOCKED_S = 0.5


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")


@pytest.fixture
def registry(database: Database, blobs: BlobStore) -> InterventionRegistry:
    return InterventionRegistry(database, blobs, BASE)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


class Paused:
    """Stops a method of the registry in its transaction until `go`."""

    def __init__(self, registry: InterventionRegistry, name: str) -> None:
        self._reached, self._go = threading.Event(), threading.Event()
        method = getattr(registry, name)

        def pausing(*args: Any) -> Any:
            result = method(*args)
            self._reached.set()
            assert self._go.wait(30)
            return result

        setattr(registry, name, pausing)

    def wait(self) -> None:
        assert self._reached.wait(30)

    def go(self) -> None:
        self._go.set()


def assert_waits(future: Future[Any]) -> None:
    with pytest.raises(TimeoutError):
        future.result(BLOCKED_S)


def test_latest_does_not_go_backwards_when_a_publish_meets_a_delete(
    registry: InterventionRegistry, artifact: Path, threads: ThreadPoolExecutor, database: Database, blobs: BlobStore
) -> None:
    for _ in range(3):
        registry.publish(OWNER, "tone", artifact)
    paused = Paused(registry, "_repoint")
    deleting = threads.submit(registry.delete, OWNER, "tone", 3)
    paused.wait()
    publishing = threads.submit(InterventionRegistry(database, blobs, BASE).publish, OWNER, "tone", artifact)
    assert_waits(publishing)
    paused.go()
    assert deleting.result(30) == ["tone@3"]
    assert publishing.result(30).id == "tone@4"
    found = registry.get(OWNER, "tone")
    assert (found.versions, found.aliases) == ([1, 2, 4], {"latest": 4})


def test_an_alias_cannot_be_set_to_a_version_that_is_being_deleted(
    registry: InterventionRegistry, artifact: Path, threads: ThreadPoolExecutor, database: Database, blobs: BlobStore
) -> None:
    for _ in range(2):
        registry.publish(OWNER, "tone", artifact)
    paused = Paused(registry, "_going")
    setting = threads.submit(registry.set_alias, OWNER, "tone", "stable", 1)
    paused.wait()
    deleting = threads.submit(InterventionRegistry(database, blobs, BASE).delete, OWNER, "tone", 1)
    assert_waits(deleting)
    paused.go()
    assert setting.result(30).aliases == {"latest": 2, "stable": 1}
    with pytest.raises(Conflict, match="stable"):
        deleting.result(30)
    assert registry.find(OWNER, Reference.parse("tone@stable")).id == "tone@1"


def at_once(threads: ThreadPoolExecutor, call: Callable[[], object], times: int = 8) -> list[str]:
    """Return how each of the calls ended."""
    together = threading.Barrier(times)

    def attempt() -> str:
        together.wait()
        try:
            call()
        except NotFound:
            return "not found"
        return "deleted"

    return sorted(future.result(60) for future in [threads.submit(attempt) for _ in range(times)])


def test_of_many_deletions_at_once_one_succeeds_and_the_others_find_nothing(
    registry: InterventionRegistry, artifact: Path, threads: ThreadPoolExecutor, database: Database, blobs: BlobStore
) -> None:
    files = FileStore(database, blobs, max_bytes=1 << 20)
    for _ in range(3):
        file = files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
        registry.publish(OWNER, "tone", artifact)
        registry.publish(OWNER, "tone", artifact)
        once = ["deleted", *["not found"] * 7]
        assert at_once(threads, lambda file_id=file.id: files.delete(OWNER, file_id)) == once  # type: ignore[misc]
        assert at_once(threads, lambda: registry.delete(OWNER, "tone", "latest")) == [*["deleted"] * 2, *once[-6:]]
        with pytest.raises(NotFound):
            registry.get(OWNER, "tone")


def test_pins_wait_for_no_transaction(
    registry: InterventionRegistry, artifact: Path, threads: ThreadPoolExecutor
) -> None:
    registry.publish(OWNER, "tone", artifact)
    registry.publish(OWNER, "mood", artifact)
    used = registry.resolve(OWNER, Reference.parse("mood"))
    paused = Paused(registry, "_repoint")
    deleting = threads.submit(registry.delete, OWNER, "tone")
    paused.wait()
    pinning = threads.submit(lambda: [(registry.pin(used), registry.unpin(used)) for _ in range(100)])
    pinning.result(10)
    assert not deleting.done()
    paused.go()
    deleting.result(30)
