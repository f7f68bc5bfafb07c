"""Bounded queues between threads, which say how full they were."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["Pipe"]

Item = TypeVar("Item")


class Pipe(Generic[Item]):
    """A queue of at most `size` items. Closed, it takes no more, and ends when it is empty; torn, it ends at once."""

    def __init__(self, size: int) -> None:
        self._items: deque[Item] = deque()
        self._size, self._closed = size, False
        self._changed = threading.Condition()
        self._lengths, self._puts = 0, 0
        self.dropped = 0

    def put(self, item: Item, *, drop: bool = False) -> bool:
        """Append an item, waiting for room. Return False if the pipe is closed or, with `drop`, full."""
        with self._changed:
            if drop and not self._closed and len(self._items) >= self._size:
                self.dropped += 1
                return False
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                return False
            self._lengths += len(self._items)
            self._puts += 1
            self._items.append(item)
            self._changed.notify_all()
            return True

    def close(self, *, tear: bool = False) -> None:
        """Take no more items; with `tear`, forget those that are waiting."""
        with self._changed:
            self._closed = True
            if tear:
                self._items.clear()
            self._changed.notify_all()

    def take(self, most: int = 1) -> list[Item]:
        """Wait for items, and return the next ones, at least one; none if the pipe has ended."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._closed)
            taken = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            self._changed.notify_all()
            return taken

    def __iter__(self) -> Iterator[Item]:
        while taken := self.take():
            yield taken[0]

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    @property
    def filled(self) -> float:
        """How full it was on average when something was put in, 0..1."""
        return self._lengths / self._puts / self._size if self._puts else 0.0
