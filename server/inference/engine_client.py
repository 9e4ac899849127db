"""The HTTP process's side of the engine: starts the process, sends requests, returns streams of tokens.

One task receives all outputs and puts each into its request's queue; the request's generator takes it from there. The
queues are unbounded: a slow client costs memory for its own tokens but never delays the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from reftserve.server.engine.config import EngineConfig
from reftserve.server.engine.engine_errors import EngineDied
from reftserve.server.engine.engine_folder import make_engine_folder, read_running, socket_address
from reftserve.server.engine.messages import (
    Cancel,
    EngineStats,
    Fatal,
    FromEngine,
    Ready,
    StepOutput,
    Submit,
    ToEngine,
    TokenOutput,
)

logger = logging.getLogger(__name__)
STOP_TIMEOUT_S = 5.0


class EngineClient:
    """One engine process. After its death, `start` starts a new one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._queues: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._is_ready = asyncio.Event()
        self.ready: Ready | None = None
        self.dtype: str | None = None  # the latest engine's, also after its end
        self.stats: EngineStats | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs and its model is loaded."""
        return self.ready is not None and self._process is not None and self._process.returncode is None

    @property
    def num_requests(self) -> int:
        """Return the number of waiting and running requests."""
        return len(self._queues)

    async def start(self) -> Ready:
        """Start the process and wait until its model is loaded. Raises EngineDied with the reason for a failure."""
        self._folder = make_engine_folder()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        # -P: a file of the working folder, such as random.py, must not be imported in place of a module.
        command = [sys.executable, "-P", "-m", "reftserve.server.engine.process", "--folder", self._folder.name]
        try:
            self._socket.bind(socket_address(Path(self._folder.name)))
            self._process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
            assert self._process.stdin is not None  # noqa: S101 - the line above requested it
            self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
            await self._process.stdin.drain()
        except (OSError, zmq.ZMQError) as cause:  # no memory, no room, or it ended before it read its input
            self._close()
            raise EngineDied(f"the engine could not be started: {cause}") from cause
        self.ready = await self._first_message(self._socket, self._process)
        self.dtype = self.ready.dtype
        self._is_ready.set()
        self._receiver = asyncio.create_task(self._receive(self._socket))
        return self.ready

    async def until_ready(self) -> Ready:
        """Wait until an engine with a loaded model is running."""
        while self.ready is None:
            await self._is_ready.wait()
        return self.ready

    def ended(self) -> Awaitable[int]:
        """Return an awaitable of the current process's exit code. Raises EngineDied when none was started."""
        if self._process is None:
            raise EngineDied("the engine was not started")
        return self._process.wait()

    async def wait(self) -> int:
        """Wait until the process ends, fail all its requests, and return its exit code.

        Ends the process if its messages cannot be read any more.
        """
        ended = asyncio.ensure_future(self.ended())
        receiver = self._receiver or ended
        await asyncio.wait([ended, receiver], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() and self._process is not None:
            self._process.kill()
        code = await ended
        if receiver is not ended and receiver.done() and not receiver.cancelled() and receiver.exception():
            logger.error("the engine was ended, because its messages cannot be read: %s", receiver.exception())
        try:
            running = read_running(Path(self._folder.name)) if self._folder is not None else set()
        except (OSError, ValueError) as cause:
            logger.warning("the engine's record of running requests cannot be read: %s", cause)
            running = set()
        self._close()
        for request_id, queue in self._queues.items():
            reason = "died" if request_id in running else "lost"
            queue.put_nowait(TokenOutput(request_id, [], reason, f"the engine ended with code {code}"))
        return code

    def end_requests(self, reason: str) -> None:
        """End all requests with finish reason "stopped" and this error."""
        for request_id, queue in self._queues.items():
            queue.put_nowait(TokenOutput(request_id, [], "stopped", reason))

    async def stop(self) -> None:
        """Stop the process and close the connection. The engine has no state to save."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._close()

    async def generate(self, request: Submit) -> AsyncGenerator[TokenOutput]:
        """Yield a request's outputs, as `InferenceEngine.generate` says."""
        if not self.is_alive:
            raise EngineDied("the engine is not running")
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._queues[request.request_id] = queue
        finished = False
        socket = self._socket
        try:
            try:
                await self._send(request)
            except asyncio.CancelledError:
                if socket is self._socket:
                    raise
                # The socket was closed because the engine had ended; nobody cancelled the request.
                raise EngineDied("the engine has ended") from None
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                if output.finish_reason in ("died", "lost"):
                    raise EngineDied(output.error or "", was_running=output.finish_reason == "died")
                yield output
        finally:
            del self._queues[request.request_id]
            if not finished and self.is_alive:
                await self._send(Cancel(request.request_id))

    async def _send(self, message: ToEngine) -> None:
        if self._socket is None:
            raise EngineDied("the engine is not running")
        await self._socket.send(self._encoder.encode(message))

    async def _first_message(self, socket: zmq.asyncio.Socket, process: asyncio.subprocess.Process) -> Ready:
        received = asyncio.ensure_future(socket.recv())
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait([received, ended], return_when=asyncio.FIRST_COMPLETED)
        if not received.done():
            # Its last message may still arrive.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(received), 1.0)
        ended.cancel()
        message = self._decoder.decode(received.result()) if received.done() else None
        received.cancel()
        if isinstance(message, Ready):
            return message
        self._close()
        reason = message.error if isinstance(message, Fatal) else f"it ended with code {process.returncode}"
        raise EngineDied(f"the engine did not start: {reason}")

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await socket.recv())
            if isinstance(message, StepOutput):
                self.stats = message.stats
                for output in message.outputs:
                    if output.request_id in self._queues:
                        self._queues[output.request_id].put_nowait(output)

    def _close(self) -> None:
        self.ready = None
        self._is_ready.clear()
        if self._receiver is not None:
            self._receiver.cancel()
            self._receiver = None
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
