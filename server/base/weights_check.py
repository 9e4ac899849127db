"""`reftserve doctor --deep`: hashes the base's files and compares them with the fingerprint that the server uses."""

from __future__ import annotations

import json

from reftserve.interventions.base_fingerprint import fingerprint
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.base.folder import fingerprint_file, resolve_model_folder
from reftserve.server.errors import Conflict
from reftserve.server.settings import Settings


def check_weights(settings: Settings) -> str:
    """Return a line about the base's files. Raises Conflict when their hashes are not the recorded ones."""
    folder, cache = resolve_model_folder(settings), fingerprint_file(settings)
    found = fingerprint(folder)
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    recorded = [BaseFingerprint(**entry) for key, entry in known.items() if key.startswith(f"{folder} [")]
    if not recorded:
        return f"{folder}: hashed; no server has recorded its fingerprint yet"
    wrong = [difference for entry in recorded for difference in entry.mismatches(found)]
    if wrong:
        raise Conflict(
            f"{folder} has changed since its fingerprint was recorded: {'; '.join(map(str, wrong))}. Restore the "
            f"files, or remove {cache} to serve them as another base"
        )
    return f"{folder}: all hashes are the recorded ones"
