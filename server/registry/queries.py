"""Queries of interventions. Each reads a bounded number of rows through an index, however many there are.

They take a session, so that a caller can make several in one transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session, aliased

from reftserve.server.errors import NotFound
from reftserve.server.registry.names import Reference, suggestion
from reftserve.server.storage.tables import Alias, Intervention, Version

S = TypeVar("S", bound=Select[*tuple[Any, ...]])
VERSIONS_SHOWN = 20  # of an intervention in a list or an error
NEIGHBOURS = 50  # names before and behind an unknown one that are compared with it


@dataclass(frozen=True)
class InterventionSummary:
    """An intervention's name with its aliases, `latest` included. versions: the newest VERSIONS_SHOWN, ascending."""

    name: str
    owner: str
    created_at: int
    versions: list[int]
    aliases: dict[str, int]


def find_version(session: Session, owner: str, reference: Reference) -> Version | None:
    """Return the version that a reference points at, or None."""
    query = (
        select(Version)
        .join(Intervention, Version.intervention_id == Intervention.id)
        .where(Intervention.owner == owner, Intervention.name == reference.name)
    )
    if isinstance(reference.version, int):
        query = query.where(Version.version == reference.version)
    else:
        is_pointed_at = and_(Alias.intervention_id == Version.intervention_id, Alias.version == Version.version)
        query = query.join(Alias, is_pointed_at).where(Alias.alias == reference.version)
    return session.scalar(query)


def find_intervention(session: Session, owner: str, name: str, *, lock: bool = False) -> Intervention:
    """Return an intervention that has versions. Raises NotFound, with near names.

    lock: publishing, deleting and aliases take turns on the row. Rows that are read before it may be outdated.
    """
    query = select(Intervention).where(Intervention.owner == owner, Intervention.name == name)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None or session.scalar(select(Version.id).where(Version.intervention_id == row.id).limit(1)) is None:
        raise NotFound(
            f"no intervention {name!r}.{suggestion(name, _neighbours(session, owner, name))}",
            param="model",
            code="model_not_found",
        )
    return row


def no_version(session: Session, row: Intervention, reference: Reference) -> NotFound:
    """Return the error for a reference to a version that an intervention does not have."""
    summary = summaries(session, [row])[0]
    shown, count = summary.versions, session.scalar(_count(row))
    versions = f"versions {shown}" if count == len(shown) else f"{count} versions, the newest are {shown},"
    return NotFound(
        f"intervention {row.name!r} has no version {reference.version!r}; it has {versions} and aliases "
        f"{sorted(summary.aliases)}",
        param="model",
        code="model_not_found",
    )


def list_interventions(
    session: Session, owner: str, *, after: str | None, limit: int, descending: bool
) -> list[InterventionSummary]:
    """Return up to `limit` interventions by name, from the one behind the name `after`."""
    return summaries(session, session.scalars(_by_name(select(Intervention), owner, after, limit, descending)).all())


def list_names(session: Session, owner: str, *, after: str | None, limit: int) -> list[tuple[str, str, int]]:
    """Return name, owner and time of creation of up to `limit` interventions by name, behind the name `after`."""
    columns = select(Intervention.name, Intervention.owner, Intervention.created_at)
    rows = session.execute(_by_name(columns, owner, after, limit, descending=False))
    return [(name, row_owner, created_at) for name, row_owner, created_at in rows]


def list_versions(
    session: Session, row: Intervention, *, after: int | None, limit: int, descending: bool
) -> Sequence[Version]:
    """Return up to `limit` versions by number, from the one behind the number `after`."""
    query = select(Version).where(Version.intervention_id == row.id)
    if after is not None:
        query = query.where(Version.version < after if descending else Version.version > after)
    return session.scalars(query.order_by(Version.version.desc() if descending else Version.version).limit(limit)).all()


def summaries(session: Session, rows: Sequence[Intervention]) -> list[InterventionSummary]:
    """Return the summaries of interventions, in their order."""
    ids = [row.id for row in rows]
    versions: dict[int, list[int]] = {number: [] for number in ids}
    aliases: dict[int, dict[str, int]] = {number: {} for number in ids}
    newer = aliased(Version)
    oldest_shown = (
        select(newer.version)
        .where(newer.intervention_id == Intervention.id)
        .order_by(newer.version.desc())
        .offset(VERSIONS_SHOWN - 1)
        .limit(1)
        .correlate(Intervention)
        .scalar_subquery()
    )
    shown = (
        select(Version.intervention_id, Version.version)
        .join(Intervention, Version.intervention_id == Intervention.id)
        .where(Intervention.id.in_(ids), Version.version >= func.coalesce(oldest_shown, 0))
        .order_by(Version.intervention_id, Version.version)
    )
    for number, version in session.execute(shown):
        versions[number].append(version)
    pointing = select(Alias.intervention_id, Alias.alias, Alias.version).where(Alias.intervention_id.in_(ids))
    for number, alias, version in session.execute(pointing.order_by(Alias.alias)):
        aliases[number][alias] = version
    return [InterventionSummary(r.name, r.owner, r.created_at, versions[r.id], aliases[r.id]) for r in rows]


def _by_name(query: S, owner: str, after: str | None, limit: int, descending: bool) -> S:
    name = Intervention.name
    query = query.where(Intervention.owner == owner, Intervention.versions.any())
    if after is not None:
        query = query.where(name < after if descending else name > after)
    return query.order_by(name.desc() if descending else name).limit(limit)


def _neighbours(session: Session, owner: str, name: str) -> list[str]:
    """Return the names next to `name` in the alphabet; all of them, if the owner has few."""
    before = _by_name(select(Intervention.name), owner, name, NEIGHBOURS, descending=True)
    behind = _by_name(select(Intervention.name), owner, name, NEIGHBOURS, descending=False)
    return [*session.scalars(before), *session.scalars(behind)]


def _count(row: Intervention) -> Select[int]:
    return select(func.count()).select_from(Version).where(Version.intervention_id == row.id)
