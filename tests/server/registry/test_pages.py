"""Lists come in pages that hold each row once, in both orders, however many share a second; errors stay short."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from published import OWNER, make_artifact, open_registry

from reftserve.server.datasets.file_store import FileStore
from reftserve.server.errors import NotFound
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.registry.names import Reference
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


def walk(list_page: Any, id_of: Any, **options: Any) -> list[Any]:
    """Return the ids of all pages."""
    found: list[Any] = []
    after = None
    for _ in range(100):
        rows, more = list_page(after=after, limit=3, **options)
        assert len(rows) == 3 if more else len(rows) <= 3
        found += map(id_of, rows)
        if not more:
            return found
        after = found[-1]
    raise AssertionError("the pages never end")


@pytest.fixture
def registry(tmp_path: Path) -> InterventionRegistry:
    registry = open_registry(tmp_path)
    artifact = make_artifact(tmp_path / "artifact")
    for name in ("b", "a", "c", "B", "a.b", "a-b", "z"):
        registry.publish(OWNER, name, artifact)
    for _ in range(29):
        registry.publish(OWNER, "b", artifact)
    registry.publish("somebody else", "y", artifact)
    registry.publish(OWNER, "gone", artifact)
    registry.delete(OWNER, "gone")
    return registry


@pytest.mark.parametrize("descending", [True, False])
def test_pages_of_files_hold_each_once_by_time_also_within_a_second(
    database_url: str, tmp_path: Path, descending: bool
) -> None:
    database = Database(database_url)
    database.migrate()
    files = FileStore(database, BlobStore(str(tmp_path / "blobs"), tmp_path / "cache"), max_bytes=1 << 20)
    ids = [files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES)).id for _ in range(7)]
    result = files.put_result(OWNER, "ftjob-1", "job.csv", b"step\n").id
    files.upload("somebody else", "set.jsonl", "fine-tune", io.BytesIO(LINES))

    def page(**options: Any) -> Any:
        return files.list_page(OWNER, descending=descending, **options)

    everything = walk(page, lambda row: row.id)
    assert sorted(everything) == sorted([*ids, result])
    times = [files.get(OWNER, file_id).created_at for file_id in everything]
    assert times == sorted(times, reverse=descending)
    assert sorted(walk(page, lambda row: row.id, purpose="fine-tune")) == sorted(ids)
    assert walk(page, lambda row: row.id, purpose="fine-tune-results") == [result]
    with pytest.raises(NotFound) as refused:
        page(after="file-none")
    assert refused.value.param == "after"
    database.close()


def test_pages_of_interventions_and_names_are_sorted_and_leave_out_what_was_deleted(
    registry: InterventionRegistry,
) -> None:
    expected = ["B", "a", "a-b", "a.b", "b", "c", "z"]

    def page(**options: Any) -> Any:
        return registry.list_page(OWNER, **options)

    assert walk(page, lambda row: row.name) == expected
    assert walk(page, lambda row: row.name, descending=True) == expected[::-1]
    rows, more = registry.list_names(OWNER, after="a", limit=3)
    assert ([name for name, _, _ in rows], more) == (["a-b", "a.b", "b"], True)


def test_pages_of_versions_go_through_all_and_a_summary_shows_the_newest(registry: InterventionRegistry) -> None:
    def page(**options: Any) -> Any:
        return registry.list_versions(OWNER, "b", **options)

    assert walk(page, lambda version: version.row.version) == list(range(30, 0, -1))
    assert walk(page, lambda version: version.row.version, descending=False) == list(range(1, 31))
    assert registry.get(OWNER, "b").versions == list(range(11, 31))
    assert registry.get(OWNER, "a").versions == [1]
    with pytest.raises(NotFound):
        registry.list_versions(OWNER, "gone")


def test_an_unknown_version_of_many_is_a_short_error(registry: InterventionRegistry) -> None:
    with pytest.raises(
        NotFound, match=r"no version 31; it has 30 versions, the newest are \[11, .*, 30\], and aliases"
    ):
        registry.find(OWNER, Reference("b", 31))


def test_a_near_name_is_found_among_many(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    artifact = make_artifact(tmp_path / "artifact")
    for letters in itertools.islice(itertools.product("bcdfghklmnprst", repeat=2), 150):
        registry.publish(OWNER, "".join(letters) * 4, artifact)
    registry.publish(OWNER, "sentiment", artifact)
    with pytest.raises(NotFound, match="Did you mean 'sentiment'"):
        registry.find(OWNER, Reference("sentimint"))
