"""The bond between a database and its store: both carry the database's id, so neither is used with a stranger.

    the store's id     rows or blobs            at the start
    the database's     any                      goes on
    another            no blobs                 the store gets the database's id
    another            blobs                    refused
    none               rows, or no blobs        the store gets the database's id (a new one, or one of an older release)
    none               blobs and no rows        refused

A lost, mistyped or empty database therefore never lets the sweep take the blobs of the right one.
"""

from __future__ import annotations

import json

from sqlalchemy import select

from reftserve.server.errors import Conflict
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Eval, File, Identity, Intervention, Job

IDENTITY_KEY = "store.json"
KINDS = ("files", "interventions", "jobs")  # the folders of blobs


def require_own_store(database: Database, blobs: BlobStore) -> None:
    """Give an unowned store the database's id. Raises Conflict, with the remedy, when the store is another's."""
    if is_own_store(database, blobs):
        return
    owner = stored_identity(blobs)
    has_blobs = any(blobs.children(kind) for kind in KINDS)
    if has_blobs and (owner is not None or not _has_rows(database)):
        of = "holds files or artifacts that this database does not list" if owner is None else f"belongs to {owner}"
        raise Conflict(
            f"the store {blobs.root} {of}, and the database {database} is {database_identity(database)}: set "
            "database_url (or data) to the store's own database, or blob_url to another store. If that database is "
            "lost, `reftserve doctor --store --rebuild` registers the store's interventions in this one",
            code="foreign_store",
        )
    claim_store(database, blobs)


def is_own_store(database: Database, blobs: BlobStore) -> bool:
    """Say whether the store carries the database's id."""
    return stored_identity(blobs) == database_identity(database)


def claim_store(database: Database, blobs: BlobStore) -> None:
    """Write the database's id into the store, whatever it carried."""
    blobs.put_bytes(IDENTITY_KEY, json.dumps({"database": database_identity(database)}).encode())


def database_identity(database: Database) -> str:
    """Return the id that the database got from its first migration."""
    with database.reading() as session:
        return session.scalars(select(Identity.id)).one()


def stored_identity(blobs: BlobStore) -> str | None:
    """Return the id that the store carries, or None. Raises Conflict when it cannot be read."""
    content = blobs.read_bytes(IDENTITY_KEY)
    if content is None:
        return None
    try:
        return str(json.loads(content)["database"])
    except (ValueError, KeyError, TypeError) as cause:
        raise Conflict(
            f"{blobs.root}/{IDENTITY_KEY} is damaged ({content[:50]!r}); if the store belongs to this database, run "
            "`reftserve doctor --store --rebuild`, which writes it anew",
            code="foreign_store",
        ) from cause


def _has_rows(database: Database) -> bool:
    with database.reading() as session:
        kinds = (File.id, Intervention.id, Job.id, Eval.id)
        return any(session.scalar(select(kind).limit(1)) is not None for kind in kinds)
