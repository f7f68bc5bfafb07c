"""The pipelines of the page: who may run when, with which settings, and how a run is followed and ended."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

from ovforge import Cancelled, Pipeline, Plugins, Progress, Result, Stop, adjusted
from ovforge.config import checked, paths_in
from ovforge.errors import InputError, OvforgeError
from ovforge_ui.fields import Field, fields_of

__all__ = ["Asked", "Host", "Moment", "Run"]

T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds after which who waits for a pipeline looks whether the wait was ended."""

_SHARE = 4
"""How many times as long as a preview takes, the run goes on before the next."""


@dataclass(frozen=True)
class Asked:
    """All that a run depends on: inputs of the task, adapters and controls by name, and the scheduler's name.

    The scheduler is "" for the one of the config.
    """

    inputs: Mapping[str, Any]
    adapters: Mapping[str, float] = field(default_factory=dict)
    controls: Mapping[str, float] = field(default_factory=dict)
    scheduler: str = ""


@dataclass
class Host:
    """A loaded pipeline with a name."""

    name: str
    pipeline: Pipeline
    plugins: Plugins

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._scheduler = self.pipeline.config.scheduler
        self.given: Mapping[str, Any] = self.pipeline.config.input
        self.fields: list[Field] = fields_of(self.pipeline.inputs_model, self.given)

    @property
    def task(self) -> Any:
        """The description of its task."""
        assert self.pipeline.resolved.task is not None
        return self.pipeline.resolved.task.extension

    def schedulers(self) -> list[str]:
        """Return the names of schedulers that it may use, if it uses any; those that need options are left out."""
        if self._scheduler is None and not self.pipeline.bundle.scheduler_config():
            return []
        names = []
        for offer in self.plugins.all("scheduler"):
            model = offer.extension.options_model()
            if model is None or not any(info.is_required() for info in model.model_fields.values()):
                names.append(str(offer.extension.name))
        return sorted(names)

    def scheduler(self) -> str:
        """Return the name of the config's scheduler, "" if it is the model's own."""
        return self._scheduler.use if self._scheduler else ""

    def call(self, asked: Asked, stop: Stop, uploads: Path, save: Callable[[Result], T]) -> T:
        """Run once, when it is its turn; return what `save` makes of the result before the next run begins.

        Raises InputError for inputs that name files which are not among the uploads.
        """
        self._check_paths(asked.inputs, uploads)
        with self._turn(stop):
            wanted = self._scheduler if asked.scheduler in ("", self.scheduler()) else asked.scheduler
            if wanted != self.pipeline.config.scheduler:
                self.pipeline.use_scheduler(wanted)
            with adjusted(self.pipeline, adapters=asked.adapters, controls=asked.controls):
                return save(self.pipeline(progress=stop, **asked.inputs))

    @contextmanager
    def _turn(self, stop: Stop) -> Iterator[None]:
        """Hold the pipeline, which serves one page at a time. Raises Cancelled if the wait was ended."""
        while not self._lock.acquire(timeout=_PATIENCE):
            if stop.asked:
                raise Cancelled
        try:
            yield
        finally:
            self._lock.release()

    def _check_paths(self, inputs: Mapping[str, Any], uploads: Path) -> None:
        model = checked(self.pipeline.inputs_model, {**self.given, **inputs}, where="input", base=self.pipeline.base)
        for name in inputs:
            for path in paths_in(getattr(model, name, None)):
                if not path.resolve().is_relative_to(uploads.resolve()):
                    raise InputError("it names a file of this machine", where=name, hint="Choose the file in the page.")


@dataclass(frozen=True)
class Moment:
    """What is to be seen of a run: how far it is, and a picture of the work as it stands."""

    progress: Progress | None = None
    preview: Any = None
    seconds: float = 0.0


class Run:
    """A run in a thread of its own. Iterating gives moments as they come, the newest only, until it has ended.

    `work` gets the callback that it has to give to pipelines; afterwards there is `result`, or an `error`.
    """

    def __init__(self, work: Callable[[Stop], Any]) -> None:
        self.stop = Stop(self._watch)
        self.result: Any = None
        self.error: OvforgeError | None = None
        self._work, self._newest = work, Moment()
        self._began, self._next = time.monotonic(), 0.0
        self._changed = _Bell()
        self._thread = Thread(target=self._run, name="ovforge-ui", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Moment]:
        seen: Moment | None = None
        while self._thread.is_alive():
            self._changed.wait(_PATIENCE)
            if self._newest is not seen:
                seen = self._newest
                yield seen

    def _run(self) -> None:
        try:
            self.result = self._work(self.stop)
        except OvforgeError as error:
            self.error = error
        except Exception as error:  # a fault of ours or of a library's: the terminal gets the whole of it
            traceback.print_exception(error)
            self.error = OvforgeError(
                f"the run failed: {type(error).__name__}", hint="The terminal that `ovforge ui` runs in says more."
            )
        finally:
            self._changed.ring()

    def _watch(self, progress: Progress) -> None:
        preview, now = self._newest.preview, time.monotonic()
        if progress.preview is not None and now >= self._next:
            pictures: Sequence[Any] = progress.preview()
            preview = pictures[0].copy() if pictures else None
            spent = time.monotonic() - now
            self._next = now + (1 + _SHARE) * spent
        self._newest = Moment(progress, preview, time.monotonic() - self._began)
        self._changed.ring()


class _Bell:
    """Wakes one who waits; a ring that nobody waited for counts for the next wait."""

    def __init__(self) -> None:
        from threading import Event

        self._event = Event()

    def ring(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> None:
        if self._event.wait(seconds):
            self._event.clear()
