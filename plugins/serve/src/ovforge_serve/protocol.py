"""The connection: bounded in number, in the time that a request's head may take, and in that of a reader who stops."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["bounded_protocol"]

_FULL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
_POLITE = 64
"""Connections above the most that still get a TLS handshake, so that they can be told why they are refused."""

_PATIENCE = 3
"""How many times longer than a request's head may take a client may read nothing."""


def bounded_protocol(most: int, seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol for at most `most` connections; a request's head must be there within `seconds`.

    A client that reads nothing of its answer for three times as long is cut off.
    """

    handshakes: dict[int, float] = {}

    class Bounded(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if self.config.is_ssl:
                self._count_handshake()

        def _count_handshake(self) -> None:
            """Raise ConnectionRefusedError if there are too many: asyncio then closes the connection.

            A handshake takes 300 kB, and nobody hears of one that fails: it counts until its time is over.
            """
            now = self.loop.time()
            for key in [key for key, since in handshakes.items() if now - since > seconds]:
                del handshakes[key]
            if len(handshakes) + len(self.connections) >= most + _POLITE:
                raise ConnectionRefusedError("too many connections")
            handshakes[id(self)] = now

        def connection_made(self, transport: Any) -> None:
            handshakes.pop(id(self), None)
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(_FULL)
                transport.close()
            else:
                self._deadline = self.loop.call_later(seconds, self._end)

        def data_received(self, data: bytes) -> None:
            if self._between() and self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self._end)
            super().data_received(data)
            if not self._between():
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            self._reads()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """Watch whether the client reads: what it does not read is held, after the request has ended as well."""
            super().pause_writing()
            self._watch(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._reads()
            super().resume_writing()

        def _watch(self, size: int) -> None:
            self._stalled = self.loop.call_later(_PATIENCE * seconds, self._end_unless_read, size)

        def _end_unless_read(self, before: int) -> None:
            size = self.transport.get_write_buffer_size()
            if size >= before:
                self.transport.abort()
            else:
                self._watch(size)

        def _reads(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def _between(self) -> bool:
            """Say whether no request is in work, so that the next one's head is awaited."""
            return self.cycle is None or self.cycle.response_complete

        def _end(self) -> None:
            self._deadline = None
            if self._between():
                self.transport.close()

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Bounded
