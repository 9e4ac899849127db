"""Measure how lookups, lists and the start grow with the registry: `python benchmarks/registry_scale.py`.

Each line compares the median time in a small store with that in a large one; the ratio should stay below 1.3. Rows are
inserted directly, and only the artifact that is looked up has its files. SQLite, in a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.errors import NotFound
from reftserve.server.registry.names import Reference
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.tables import Alias, File, Intervention, Version

OWNER = "default"
BASE = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=64, num_layers=4, vocab_size=40, weights_hash="w")
MANIFEST = {"family": "loreft", "edits": [{"layer": 1, "positions": "l1", "rank": 4}] * 30}
KEY = "interventions/stored"
GOAL = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="calls of each kind")
    parser.add_argument("--interventions", type=int, nargs=2, default=(10, 100_000))
    parser.add_argument("--listed", type=int, nargs=2, default=(100, 100_000))
    parser.add_argument("--versions", type=int, nargs=2, default=(1, 1_000))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        few, many = (filled(scratch / f"i{count}", interventions=count) for count in options.interventions)
        compare("resolve, interventions", options.interventions, (few, many), resolve, options.runs)
        compare("unknown name, interventions", options.interventions, (few, many), unknown, options.runs)
        stores = filled(scratch / "l100", interventions=options.listed[0], files=options.listed[0]), many
        add_files(many, options.listed[1])
        compare("list 20 interventions", options.listed, stores, list_interventions, options.runs)
        compare("list 20 files", options.listed, stores, list_files, options.runs)
        compare("list 20 names", options.listed, stores, list_names, options.runs)
        stores = tuple(filled(scratch / f"v{count}", interventions=10, versions=count) for count in options.versions)
        compare("resolve, versions", options.versions, stores, resolve, options.runs)
        compare("get an intervention, versions", options.versions, stores, get, options.runs)
        compare("list 20 versions", (20, options.versions[1]), (with_versions(scratch, 20), stores[1]), versions, 300)
        compare_starts(scratch, options.listed)


def filled(data: Path, *, interventions: int, versions: int = 1, files: int = 0) -> Store:
    """Return a store of interventions; the one in the middle has `versions` versions, and the latest its files."""
    store = open_store(Settings(data=data), BASE)
    middle = interventions // 2
    (data / "blobs" / KEY).mkdir(parents=True)
    counts = [versions if number == middle else 1 for number in range(interventions)]
    with store.database.session() as session:
        session.execute(
            insert(Intervention),
            [
                {"id": n + 1, "owner": OWNER, "name": f"tone-{n:06d}", "next_version": c + 1, "created_at": n}
                for n, c in enumerate(counts)
            ],
        )
        session.execute(insert(Version), [row(n, v) for n, c in enumerate(counts) for v in range(1, c + 1)])
        session.execute(
            insert(Alias),
            [{"intervention_id": n + 1, "alias": "latest", "owner": OWNER, "version": c} for n, c in enumerate(counts)],
        )
    add_files(store, files)
    return store


def row(number: int, version: int) -> dict[str, Any]:
    return {
        "owner": OWNER,
        "intervention_id": number + 1,
        "version": version,
        "content_hash": "h",
        "bytes": 1,
        "parameters": 1,
        "manifest": MANIFEST,
        "blob_key": KEY,
        "created_at": number,
    }


def add_files(store: Store, count: int) -> None:
    rows = [
        {"id": f"file-{n:06d}", "owner": OWNER, "filename": "f", "purpose": "fine-tune", "bytes": 1, "sha256": "s"}
        | {"blob_key": f"files/{n}", "created_at": n // 7}
        for n in range(count)
    ]
    with store.database.session() as session:
        if rows:
            session.execute(insert(File), rows)


def with_versions(scratch: Path, count: int) -> Store:
    return filled(scratch / f"v{count}", interventions=10, versions=count)


def middle_name(store: Store) -> str:
    rows, _ = store.interventions.list_names(OWNER, after=None, limit=200_000)
    return rows[len(rows) // 2][0]


def resolve(store: Store, name: str) -> object:
    return store.interventions.resolve(OWNER, Reference(name))


def get(store: Store, name: str) -> object:
    return store.interventions.get(OWNER, name)


def unknown(store: Store, name: str) -> object:
    try:
        return store.interventions.resolve(OWNER, Reference(f"{name}x"))
    except NotFound as cause:
        return cause


def list_interventions(store: Store, name: str) -> object:
    return store.interventions.list_page(OWNER, after=name, limit=20)


def list_files(store: Store, name: str) -> object:
    return store.files.list_page(OWNER, after="file-000050", limit=20)


def list_names(store: Store, name: str) -> object:
    return store.interventions.list_names(OWNER, after=name, limit=20)


def versions(store: Store, name: str) -> object:
    return store.interventions.list_versions(OWNER, name, limit=20)


def compare(
    what: str, counts: tuple[int, ...], stores: tuple[Store, ...], call: Callable[[Store, str], object], runs: int
) -> None:
    """Print the medians. The stores take turns, so that other load on the machine falls on both."""
    names = [middle_name(store) for store in stores]
    times: list[list[float]] = [[] for _ in stores]
    for _ in range(runs):
        for store, name, taken in zip(stores, names, times, strict=True):
            began = time.perf_counter()
            call(store, name)
            taken.append(time.perf_counter() - began)
    show(what, counts, [statistics.median(taken) for taken in times])


def compare_starts(scratch: Path, counts: tuple[int, ...]) -> None:
    """Print how long opening a store takes, until the server would listen, by the number of its blobs."""
    medians = []
    for count in counts:
        data = scratch / f"s{count}"
        store = filled(data, interventions=10)
        folder = data / "blobs" / "files"
        folder.mkdir()
        for number in range(count):
            (folder / str(number)).touch()
        store.database.close()
        times = []
        for _ in range(11):
            began = time.perf_counter()
            store = open_store(Settings(data=data), BASE)
            times.append(time.perf_counter() - began)
            store.database.close()
        medians.append(statistics.median(times))
    show("open a store, blobs", counts, medians)


def show(what: str, counts: tuple[int, ...], medians: list[float]) -> None:
    ratio = medians[1] / medians[0]
    times = ", ".join(f"{count:,}: {median * 1e3:.3f} ms" for count, median in zip(counts, medians, strict=True))
    print(f"{what:32} {times:40} ratio {ratio:.2f}{'' if ratio <= GOAL else '  above the goal'}", flush=True)


if __name__ == "__main__":
    main()
