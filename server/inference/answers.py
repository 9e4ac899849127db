"""Requests to the engine from beginning to end, in the server's errors, for whoever streams nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from msgspec.structs import replace

from reftserve.server.engine.engine_errors import EngineDied
from reftserve.server.engine.messages import InterventionRef, Submit, TokenOutput
from reftserve.server.errors import DeadlineExceeded, InvalidRequest, Unavailable
from reftserve.server.inference.engine_client import EngineClient
from reftserve.server.registry.composition import Composition

RETRY_AFTER_S = 1.0


async def answers(engine: EngineClient, submits: Sequence[Submit]) -> list[TokenOutput]:
    """What becomes of each request, all its tokens in one output. One that fails cancels the others.

    Raises Unavailable when the engine dies, InvalidRequest when it refuses a request, DeadlineExceeded.
    """
    tasks = [asyncio.create_task(answer(engine, submit)) for submit in submits]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answer(engine: EngineClient, submit: Submit) -> TokenOutput:
    """What becomes of one request, all its tokens in one output.

    Raises Unavailable when the engine dies, InvalidRequest when it refuses the request, DeadlineExceeded.
    """
    token_ids: list[int] = []
    last = TokenOutput(submit.request_id, [])
    try:
        async with contextlib.aclosing(engine.generate(submit)) as outputs:
            async for last in outputs:
                check_output(last)
                token_ids += last.token_ids
    except EngineDied as cause:
        raise engine_died(cause) from cause
    return replace(last, token_ids=token_ids)


def check_output(output: TokenOutput) -> None:
    """Raise what an output says went wrong: DeadlineExceeded, or InvalidRequest when the engine refuses."""
    if output.finish_reason == "timeout":
        raise DeadlineExceeded(f"{output.error}; give a longer timeout, or fewer max_tokens", param="timeout")
    if output.error is not None:
        raise InvalidRequest(output.error, code="request_refused")


def engine_died(cause: EngineDied) -> Unavailable:
    """The engine is not there, as clients hear of it."""
    return Unavailable(str(cause), code="engine_died", retry_after_s=RETRY_AFTER_S)


def intervention_refs(versions: Composition) -> tuple[InterventionRef, ...]:
    """What the engine loads."""
    return tuple(InterventionRef(str(version.folder), version.row.content_hash, scale) for version, scale in versions)


def salted(owner: str, cache_salt: str | None = None) -> str:
    """The salt of an owner's cached prefixes. Owners never share: nobody may find out by timing what another asked."""
    return f"{owner}\0{cache_salt or ''}"
