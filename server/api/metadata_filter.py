"""The query parameters `metadata[key]=value` of lists, which OpenAI's clients send."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Request

from reftserve.server.errors import InvalidRequest

_PARAMETER = re.compile(r"metadata\[(.+)\]", re.DOTALL)


async def _wanted_metadata(request: Request) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata"):
            continue
        if name == "metadata" and value == "null":  # not given, as in a body
            continue
        found = _PARAMETER.fullmatch(name)
        if found is None or found[1] in wanted:
            raise InvalidRequest(
                f"parameter {name!a}; expected metadata[key]=value, once for each key", param="metadata"
            )
        wanted[found[1]] = value
    return wanted


WantedMetadata = Annotated[dict[str, str], Depends(_wanted_metadata)]
