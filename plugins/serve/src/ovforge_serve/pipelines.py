"""The pipelines that are served, by name: loaded when they are first needed, released when memory is short."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ovforge import Pipeline, PipelineConfig, Plugins
from ovforge.config import apply_overrides, read_config
from ovforge.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ovforge.contracts import TaskExtension

__all__ = ["Pipelines", "Served", "resident_memory", "split_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(eq=False)
class Served:
    """A pipeline with a name. What is not loaded has no `pipeline`."""

    name: str
    config: PipelineConfig
    base: Path
    task: TaskExtension
    width: int
    """Calls that run at the same time."""

    pipeline: Pipeline | None = None
    uses: int = 0
    used: float = 0.0
    size: int = 0
    """Bytes by which memory grew when it was loaded the last time."""
    loading: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def inputs(self) -> type[BaseModel]:
        """What a call takes."""
        return self.task.inputs_model()

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of what a call takes."""
        return self.inputs.model_json_schema()

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """The threads that its calls run in."""
        return ThreadPoolExecutor(self.width, thread_name_prefix=self.name)


class Pipelines(Mapping[str, Served]):
    """Pipelines by name. `say` is told of loading and releasing."""

    def __init__(
        self,
        places: Sequence[str],
        *,
        overrides: Sequence[str] = (),
        memory: int | None = None,
        threads: int = 1,
        cache: str | None = "default",
        say: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self._plugins = Plugins()
        self._memory, self._cache, self._say = memory, cache, say
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        for place in places:
            served = self._read(place, overrides, threads)
            if served.name in self._served:
                raise ConfigError(
                    f"two pipelines are called {served.name!r}", where=place, hint="Write NAME=CONFIG for one of them."
                )
            self._served[served.name] = served

    def _read(self, place: str, overrides: Sequence[str], threads: int) -> Served:
        """Read a config, and check all that it says without loading a model."""
        from ovforge import plan

        name, path = split_name(place)
        config = PipelineConfig.of(apply_overrides(read_config(path), overrides), where=str(path))
        if config.task is None:
            raise ConfigError("`task` is missing", where=str(path), hint="Say what the pipeline is for: task = ...")
        task: Any = self._plugins.find("task", config.task.use).extension
        plan(path, overrides=overrides, plugins=self._plugins, cache=self._cache)
        return Served(name, config, path.parent, task, threads if task.threads else 1)

    @contextlib.contextmanager
    def use(self, served: Served) -> Iterator[Pipeline]:
        """Give the pipeline, loaded; it is not released while the block runs. Call it in a thread of the pipeline's."""
        with self._lock:
            served.uses += 1
        try:
            with served.loading:
                pipeline = served.pipeline or self._load(served)
            yield pipeline
        finally:
            with self._lock:
                served.uses -= 1
                served.used = time.monotonic()

    def _load(self, served: Served) -> Pipeline:
        self._make_room(served, served.size)
        before, start = resident_memory(), time.perf_counter()
        pipeline = Pipeline.from_config(served.config, base=served.base, plugins=self._plugins, cache=self._cache)
        pipeline.start_timings()  # waits until all is compiled
        served.pipeline = pipeline
        served.size = max(0, resident_memory() - before)
        self._say("loaded", pipeline=served.name, seconds=round(time.perf_counter() - start, 3), bytes=served.size)
        self._make_room(served, 0)
        return pipeline

    def _make_room(self, wanted: Served, more: int) -> None:
        """Release pipelines that rest until `more` bytes fit below the limit, or none is left."""
        while self._memory is not None and resident_memory() + more > self._memory:
            with self._lock:
                resting = [one for one in self.values() if one.pipeline and not one.uses and one is not wanted]
                if not resting:
                    return
                oldest = min(resting, key=lambda one: one.used)
                oldest.pipeline = None
            _return_memory()
            self._say("released", pipeline=oldest.name, bytes=resident_memory())

    def close(self) -> None:
        """Wait for what still runs, and release all."""
        for served in self.values():
            served.threads.shutdown()
            served.pipeline = None

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)


def split_name(place: str) -> tuple[str, Path]:
    """Return (name, path) of "NAME=PATH", or of a path alone, which is called as its file. Raises InputError."""
    name, equals, path = place.partition("=")
    if not equals:
        name, path = Path(place).stem, place
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a valid name of a pipeline",
            where=place,
            hint="Write NAME=CONFIG, with a name of letters, digits, - and _.",
        )
    return name, Path(path)


def resident_memory() -> int:
    """Return the bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def _return_memory() -> None:
    """Give back to the system what was freed: glibc keeps it otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
