"""`reftserve doctor --store`, `--rebuild` and `--deep`: what the database lists, what the store holds, and the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reftserve.server.api.auth import DEFAULT_OWNER
from reftserve.server.base.folder import open_base
from reftserve.server.base.weights_check import check_weights
from reftserve.server.errors import Conflict
from reftserve.server.registry.inspection import inspect_store, rebuild, trashed
from reftserve.server.registry.store import open_store
from reftserve.server.settings import Settings


@dataclass(frozen=True)
class Line:
    """A line of the doctor's answer."""

    text: str
    is_fault: bool = False


def examine(settings: Settings, *, store: bool, rebuild: bool, deep: bool) -> Iterator[Line]:
    """Yield the results of the chosen checks. rebuild: register lost interventions first. Raises ServerError."""
    if deep:
        try:
            yield Line(check_weights(settings))
        except Conflict as cause:
            yield Line(cause.message, is_fault=True)
    if store:
        yield from _examine_store(settings, register=rebuild)


def _examine_store(settings: Settings, *, register: bool) -> Iterator[Line]:
    base = open_base(settings)
    store = open_store(settings, base.fingerprint, any_identity=True)
    if register:
        for line in rebuild(store, base.fingerprint, owner=DEFAULT_OWNER, override=settings.override_fingerprint):
            yield Line(line)
    faults = [Line(fault, is_fault=True) for fault in inspect_store(store)]
    yield from faults
    for key in trashed(store):
        yield Line(f"in the trash: {key}")
    if not faults:
        yield Line(f"{store.blobs.root}: every row of {store.database} has its intact files")
