"""Who may call a task when: from several threads, and after a fork."""

from __future__ import annotations

import threading
from types import TracebackType

from ovforge.contracts.extensions import TaskExtension
from ovforge.errors import InputError
from ovforge.model.runtime import check_process

__all__ = ["Turns"]


class Turns:
    """Serves the calls of one task: one after the other, unless the task says that it is safe to call from threads.

    Tasks keep inference requests and states between calls, and OpenVINO refuses a request that is busy. In a `with`
    block a call has its turn. Raises DeviceError in a forked process, and InputError for a call from within a call
    (from its progress callback), which would wait for itself.
    """

    def __init__(self, task: TaskExtension) -> None:
        self._lock = None if task.threads else threading.Lock()
        self._name, self._thread = task.name, 0

    def __enter__(self) -> None:
        check_process()
        if self._lock is None:
            return
        if self._thread == threading.get_ident():
            raise InputError(
                "a call of the pipeline calls the same pipeline",
                where=self._name,
                hint="Call it when the first call has ended, or load a second pipeline.",
            )
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._thread = 0
            self._lock.release()
