"""For programs that run a pipeline for several people: an end for runs that nobody awaits, settings for one run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ovforge.contracts.stages import Progress, ignore_progress
from ovforge.errors import Cancelled, InputError

if TYPE_CHECKING:
    from ovforge.run.pipeline import Pipeline

__all__ = ["Stop", "adjusted"]


class Stop:
    """Ends a run at its next step; give it to a pipeline as its progress callback. `watch` sees each moment first."""

    def __init__(self, watch: Callable[[Progress], None] = ignore_progress) -> None:
        self._asked = threading.Event()
        self._watch = watch

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Let the run end."""
        self._asked.set()

    def __call__(self, moment: Progress) -> None:
        """Raise Cancelled if the run is to end."""
        if self._asked.is_set():
            raise Cancelled
        self._watch(moment)


@contextmanager
def adjusted(
    pipeline: Pipeline,
    *,
    adapters: Mapping[str, float] | None = None,
    controls: Mapping[str, float] | None = None,
) -> Iterator[None]:
    """Set adapters and controls while the block runs; those that are not named stay as they are.

    Nobody else may call the pipeline meanwhile. Raises InputError for unknown ones, and for a pipeline whose calls run
    side by side, since they share both.
    """
    if not adapters and not controls:
        yield
        return
    assert pipeline.resolved.task is not None
    if pipeline.resolved.task.extension.threads:
        raise InputError("this pipeline's calls run side by side, and share adapters and controls", where="adapter")
    before = dict(pipeline.adapters), dict(pipeline.controls)
    try:
        if adapters:
            pipeline.adapters.set({**before[0], **adapters})
        pipeline.controls.update(controls or {})
        yield
    finally:
        pipeline.adapters.set(before[0])
        pipeline.controls.update(before[1])
