"""Answers that are sent while their run goes on."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future

from fastapi import Response
from fastapi.responses import StreamingResponse

from ovforge import Cancelled, Stop
from ovforge.errors import OvforgeError
from ovforge_serve.log import note
from ovforge_serve.settings import status_of

__all__ = ["Pieces", "streamed"]

_AHEAD = 64
"""Pieces that wait for a client which reads slowly; then its run waits."""


class Pieces:
    """What a run has sent and nobody has read yet. Make it in the server's loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
        self._loop = asyncio.get_running_loop()

    async def send(self, piece: bytes) -> None:
        """Send a piece when there is room."""
        await self._queue.put(piece)

    def send_from_thread(self, piece: bytes, stop: Stop) -> None:
        """Send a piece from the thread of a run. Raises Cancelled if the run is to end while it waits for room."""
        sent: Future[None] = asyncio.run_coroutine_threadsafe(self._queue.put(piece), self._loop)
        while True:
            try:
                return sent.result(timeout=0.2)
            except TimeoutError:
                if stop.asked:
                    sent.cancel()
                    raise Cancelled from None

    async def until(self, work: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """Yield pieces as they come until the work that sends them has ended."""
        while True:
            piece = asyncio.create_task(self._queue.get())
            try:
                await asyncio.wait({piece, work}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done() and self._queue.empty():
                    return
                yield await piece
            finally:
                piece.cancel()


async def streamed(
    work: Callable[[Pieces], Awaitable[None]], kind: str, failed: Callable[[OvforgeError], bytes]
) -> Response:
    """Answer with what `work` sends; `failed` makes the last piece of an error.

    What refuses the work before anything was sent is raised here, so that the answer has its status. The work ends if
    nobody reads the answer any more.
    """
    pieces = Pieces()

    async def whole() -> None:
        await work(pieces)

    task = asyncio.create_task(whole())
    coming = pieces.until(task)
    first = await anext(coming, None)
    if first is None:
        task.result()

    async def content() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield first
            async for piece in coming:
                yield piece
            if (error := task.exception()) is not None:
                yield failed(_told(error))
        finally:
            task.cancel()

    return StreamingResponse(content(), media_type=kind)


def _told(error: BaseException) -> OvforgeError:
    """Return an error as the client is told it; what is the server's own fault is for its log alone."""
    if isinstance(error, OvforgeError) and status_of(error) < 500:
        return error
    note(error="".join(traceback.format_exception(error)))
    return OvforgeError("the run failed", hint="The server's log says why.")
