"""How a run learns that nobody awaits it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ovforge import Cancelled, Progress

__all__ = ["Stop"]


class Stop:
    """Ends a run at its next step; give it to a pipeline as its progress callback. `watch` sees each moment first."""

    def __init__(self, watch: Callable[[Progress], None] = lambda _: None) -> None:
        self._asked = threading.Event()
        self._watch = watch

    def ask(self) -> None:
        """Let the run end."""
        self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._asked.is_set()

    def __call__(self, moment: Progress) -> None:
        if self.asked:
            raise Cancelled
        self._watch(moment)
