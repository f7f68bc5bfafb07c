"""Work on the chunks of a file with all processors. The ciphers run outside of Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

__all__ = ["for_each"]

_FEW = 4
"""Up to this many chunks are not worth other threads."""

Worker = AbstractContextManager[Callable[[int], None]]


def for_each(count: int, worker: Callable[[], Worker]) -> None:
    """Call the work of `worker()` with 0, 1, ... `count` - 1, each number once.

    Every thread makes a worker of its own, with its file and buffers. The first error ends all of them and is raised.
    """
    numbers = iter(range(count))
    lock, failed = threading.Lock(), threading.Event()

    def run() -> None:
        with worker() as work:
            try:
                while not failed.is_set():
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    work(number)
            except BaseException:
                failed.set()
                raise

    threads = min(count // _FEW, os.cpu_count() or 1)
    if threads < 2:
        run()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="ovforge-decrypt") as pool:
        for done in [pool.submit(run) for _ in range(threads)]:
            done.result()
