"""Leases let one process at a time work on a job or a run of an eval, as long as it renews its lease.

A row's lease expires unless renewed, and its fence grows with each change of owner. Every write compares the fence in
its own transaction, so a process that was presumed dead and wakes up loses its lease before it can write or publish.

    waiting ─take──► running ─release─► ended, or paused
                     ▲     │
                     └─take┘  by another process, once the lease has expired

A timer renews leases, not progress, so hanging work keeps its row until its process ends or the work is cancelled.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, or_, select, update
from sqlalchemy.orm import Session

from reftserve.server.errors import ServerError
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Leased

MAX_ATTEMPTS = 20  # after this many leases in a row without progress the work fails
RENEWALS_PER_LEASE = 4
Row = TypeVar("Row", bound=Leased)


class LeaseLost(Exception):
    """The row was paused, cancelled, deleted or taken over. Nothing was written."""


@dataclass(frozen=True)
class Lease(Generic[Row]):
    """The right to work on a row until another process owns it. attempt: leases of the row since its last progress."""

    table: type[Row]
    id: str
    fence: int
    attempt: int


def worker_id() -> str:
    """Return a name that is unique among all processes, now and later."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Leases(Generic[Row]):
    """The leases of one process on rows of one table. lease_s: seconds until a lease expires unless renewed."""

    def __init__(self, database: Database, table: type[Row], worker: str, *, lease_s: float) -> None:
        self._database = database
        self._table = table
        self._worker = worker
        self._lease_s = lease_s

    def take(self) -> Lease[Row] | None:
        """Take the oldest row that is queued or whose lease has expired; return None if there is none."""
        # Read first: an idle process must not lock the database with every poll.
        with self._database.reading() as session:
            if session.scalar(self._waiting(self._database.now(session))) is None:
                return None
        with self._database.session() as session:
            now = self._database.now(session)
            row: Row | None = session.scalar(self._waiting(now).with_for_update(skip_locked=True))
            if row is None:
                return None
            if row.status == "queued":
                row.status = self._table.RUNNING
            row.started_at = row.started_at or int(time.time())
            row.attempts += 1
            return self._lend(row, now)

    def take_ended(self, row_id: str) -> Lease[Row] | None:
        """Take an ended row to clean up after it; return None if it has not ended or another process holds it."""
        with self._database.session(may_use_reserve=True) as session:
            now = self._database.now(session)
            table = self._table
            query = select(table).where(table.id == row_id, table.status.in_(table.ENDED), _is_free(table, now))
            row = session.scalar(query.with_for_update(skip_locked=True))
            return None if row is None else self._lend(row, now)

    def renew(self) -> None:
        """Extend all leases of this process."""
        mine = self._table.lease_worker == self._worker
        # Read first: an idle process must not lock the database with every heartbeat.
        with self._database.reading() as session:
            if session.scalar(select(self._table.id).where(mine).limit(1)) is None:
                return
        with self._database.session(may_use_reserve=True) as session:
            expires_at = self._database.now(session) + self._lease_s
            session.execute(update(self._table).where(mine).values(lease_expires_at=expires_at))

    def release(self, *, in_order: bool = True) -> None:
        """Give all leases back at once. in_order: the work did not cause the release, so the attempt does not count."""
        with self._database.session(may_use_reserve=True) as session:
            query = select(self._table).where(self._table.lease_worker == self._worker)
            for row in session.scalars(query.with_for_update()):
                release_lease(row)
                if in_order:
                    row.attempts = max(0, row.attempts - 1)

    def _waiting(self, now: float) -> Select[Any]:
        table = self._table
        return (
            select(table)
            .where(table.status.in_(table.ALIVE), _is_free(table, now))
            .order_by(table.created_at, table.id)
            .limit(1)
        )

    def _lend(self, row: Row, now: float) -> Lease[Row]:
        row.fence += 1
        row.lease_worker = self._worker
        row.lease_expires_at = now + self._lease_s
        return Lease(self._table, row.id, row.fence, row.attempts)


def require_attempts_left(lease: Lease[Any], milestone: str) -> None:
    """Raise ServerError when MAX_ATTEMPTS processes in a row have ended before the work reached its milestone."""
    if lease.attempt > MAX_ATTEMPTS:
        raise ServerError(f"{MAX_ATTEMPTS} processes in a row ended before {milestone}", code="worker_lost")


def require_lease(session: Session, lease: Lease[Row], *, lock: bool = True) -> Row:
    """Return the row, locked for this transaction if `lock`. Raises LeaseLost if it was taken away or deleted."""
    row = session.get(lease.table, lease.id, with_for_update=lock)
    if row is None:
        raise LeaseLost(f"the lease on {lease.id} is lost: the row is deleted")
    if row.fence != lease.fence:
        raise LeaseLost(f"the lease on {lease.id} is lost: its fence is {lease.fence}, the row's is {row.fence}")
    return row


def release_lease(row: Leased) -> None:
    """Free a row. The process that held it gets LeaseLost at its next write."""
    row.fence += 1
    row.lease_worker = None
    row.lease_expires_at = None


def is_held(row: Leased, now: float) -> bool:
    """Return whether a process holds the row."""
    return row.lease_expires_at is not None and row.lease_expires_at >= now


def _is_free(table: type[Leased], now: float) -> ColumnElement[Any]:
    return or_(table.lease_worker.is_(None), table.lease_expires_at < now)
