"""Runs `reftserve serve`: locks the data folder, binds the port and serves HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from reftserve.server.api.connection import connection_type
from reftserve.server.app import create_app, drain, open_services
from reftserve.server.base.memory import freeze_gc
from reftserve.server.environment import listening
from reftserve.server.errors import Conflict, ServerError
from reftserve.server.settings import LOG_FORMAT, Settings

MIN_FILES = 4096  # a connection each for max_queue requests, and room for idle ones, artifacts and the database
CLOSE_S = 5  # for connections to take their last bytes, after answers have ended


class GracefulServer(uvicorn.Server):
    """A server that lets answers end before it closes connections. A second signal closes them at once.

    drain: refuses new requests, and returns when the running ones have ended.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._has_signal = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the first signal for `on_tick`."""
        if self._has_signal:
            super().handle_exit(sig, frame)
        self._has_signal = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server is to close its connections."""
        if self._has_signal and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter) or (self._draining is not None and self._draining.done())


def serve(settings: Settings) -> None:
    """Serve until interrupted. Raises Conflict (folder or port in use), NotFound (no model), ServerError (engine)."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    failures: list[str] = []
    with _data_folder(settings), listening(settings) as listener:
        services = open_services(settings)
        port = listener.getsockname()[1]
        server: GracefulServer

        def give_up(reason: str) -> None:
            failures.append(reason)
            server.should_exit = True

        app = create_app(services, give_up)
        raise_file_limit()
        config = uvicorn.Config(
            app,
            http=connection_type(settings.header_timeout_s),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=CLOSE_S,
        )
        server = GracefulServer(config, lambda: drain(services))
        logging.getLogger(__name__).info(
            "serving %s on http://%s:%d (documentation at /docs)",
            services.base.name,
            f"[{settings.host}]" if ":" in settings.host else settings.host,
            port,
        )
        freeze_gc()
        server.run(sockets=[listener])
    if failures:
        raise ServerError(failures[0])


def raise_file_limit() -> None:
    """Let the process open as many files and connections as the system allows; warn when these are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses its own infinity.
    wanted = max(soft, MIN_FILES) if hard == resource.RLIM_INFINITY else hard
    if soft != wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < MIN_FILES:
        logging.getLogger(__name__).warning(
            "this process may open only %d files and connections; `ulimit -Hn %d` allows more clients",
            wanted,
            MIN_FILES,
        )


@contextmanager
def _data_folder(settings: Settings) -> Iterator[None]:
    settings.data.mkdir(parents=True, exist_ok=True)
    pid_file = settings.data / "server.pid"
    try:
        with FileLock(settings.data / "server.lock", timeout=0):
            pid_file.write_text(str(os.getpid()))
            yield
    except Timeout as cause:
        pid = pid_file.read_text() if pid_file.exists() else "unknown"
        raise Conflict(
            f"another server (process {pid}) uses the data folder {settings.data.resolve()}; stop it, or choose "
            "another folder with --data"
        ) from cause
