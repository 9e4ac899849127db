"""The answers of one generation side by side: each runs as a task, and one queue collects their pieces.

The queue is unbounded: the tasks put, the stream takes. A slow client costs memory for its own tokens, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence

from reftserve.server.inference.generation import Piece, join_pieces

AnswerPieces = Callable[[int], AsyncGenerator[Piece]]


class AnswerQueue:
    """Pieces of `count` answers in the order in which they come. answer: yields one answer's pieces."""

    def __init__(self, count: int, answer: AnswerPieces) -> None:
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._run(answer, index)) for index in range(count)]

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yield pieces until every answer has ended. Raises the first error of an answer."""
        running = len(self._tasks)
        while running:
            for item in await self._next():
                if isinstance(item, Exception):
                    raise item
                running -= item.finish_reason is not None
                yield item

    async def __aenter__(self) -> AnswerQueue:
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, answer: AnswerPieces, index: int) -> None:
        try:
            async with contextlib.aclosing(answer(index)) as pieces:
                async for piece in pieces:
                    self._queue.put_nowait(piece)
        except Exception as cause:
            # Whatever it is, the stream must hear of it; otherwise it would wait for ever.
            self._queue.put_nowait(cause)

    async def _next(self) -> Sequence[Piece | Exception]:
        """Wait for an item, take all queued ones, and join pieces of one answer: a slow reader gets fewer events."""
        groups: list[list[Piece] | Exception] = []
        item: Piece | Exception = await self._queue.get()
        while True:
            last = groups[-1] if groups else None
            if isinstance(item, Exception):
                groups.append(item)
            elif isinstance(last, list) and last[0].index == item.index:
                last.append(item)
            else:
                groups.append([item])
            if self._queue.empty():
                return [join_pieces(group) if isinstance(group, list) else group for group in groups]
            item = self._queue.get_nowait()
