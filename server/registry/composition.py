"""Compositions: a request's interventions, resolved to immutable versions and pinned while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from reftserve.client.schemas import InterventionUse
from reftserve.server.errors import InvalidRequest, NotFound
from reftserve.server.registry.intervention_registry import InterventionRegistry, PublishedVersion
from reftserve.server.registry.names import Reference, suggestion

Composition = list[tuple[PublishedVersion, float]]


def resolve_composition(
    registry: InterventionRegistry,
    owner: str,
    model: str,
    interventions: Sequence[InterventionUse] | None,
    *,
    base: str,
    limit: int,
) -> Composition:
    """Resolve `model`, unless it is the base, and the list. Raises NotFound, or InvalidRequest for a wrong list."""
    wanted = [(_reference(use), use.scale) for use in interventions or ()]
    if model != base:
        wanted.insert(0, (Reference.parse(model), 1.0))
    if len(wanted) > limit:
        raise InvalidRequest(f"{len(wanted)} interventions; at most {limit} can be composed", param="interventions")
    versions: Composition = []
    for reference, scale in wanted:
        version = _resolve(registry, owner, reference, base)
        if any(version.row.id == other.row.id for other, _ in versions):
            raise InvalidRequest(
                f"intervention {version.id} is named twice; name it once, with the intended scale",
                param="interventions",
                code="duplicate_intervention",
            )
        versions.append((version, scale))
    return versions


@contextlib.contextmanager
def pinned(registry: InterventionRegistry, versions: Composition) -> Iterator[None]:
    """Pin the versions, so that their files stay. Raises NotFound when one has been deleted since it was resolved."""
    with contextlib.ExitStack() as stack:
        for version, _ in versions:
            registry.pin(version)
            stack.callback(registry.unpin, version)
        yield


def _reference(use: InterventionUse) -> Reference:
    return Reference.parse(use.name if use.version is None else f"{use.name}@{use.version}")


def _resolve(registry: InterventionRegistry, owner: str, reference: Reference, base: str) -> PublishedVersion:
    try:
        return registry.resolve(owner, reference)
    except NotFound as cause:
        if cause.code != "model_not_found" or "Did you mean" in cause.message or "has no version" in cause.message:
            raise
        near = suggestion(reference.name, [base])
        raise NotFound(f"{cause.message}{near}", param="model", code="model_not_found") from cause
