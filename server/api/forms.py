"""Multipart bodies: each field once, and only known ones. FastAPI takes the last of several and ignores the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

from fastapi import Request

from reftserve.server.errors import InvalidRequest

# OpenAI's fields that would change what happens to the file.
UNSUPPORTED = {"expires_after": "files do not expire; delete the file when it is no longer needed"}


def only_fields(*known: str) -> Callable[[Request], Awaitable[None]]:
    """Return a dependency that raises InvalidRequest for a field which is unknown or given twice."""

    async def check(request: Request) -> None:
        # FastAPI has read the form, and the request keeps it.
        given = Counter(name for name, value in (await request.form()).multi_items() if name in known or value != "")
        for name, count in given.items():
            field = name.partition("[")[0]
            if field in UNSUPPORTED:
                raise InvalidRequest(f"{field}: {UNSUPPORTED[field]}", param=field, code="unknown_field")
            if name not in known:
                raise InvalidRequest(
                    f"unknown field {name!r}; expected {' and '.join(known)}", param=name, code="unknown_field"
                )
            if count > 1:
                raise InvalidRequest(
                    f"field {name!r} is given {count} times; send one in each request",
                    param=name,
                    code="duplicate_field",
                )

    return check
