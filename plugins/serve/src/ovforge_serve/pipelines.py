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
from typing import TYPE_CHECKING, Any, cast

import psutil

from ovforge import Pipeline, PipelineConfig, Plugins, find_loader, open_model
from ovforge.cli import split_name
from ovforge.errors import ConfigError, DeviceError, OvforgeError
from ovforge.model import OPENVINO_ERRORS, core, reason_of
from ovforge.store import Cache
from ovforge_serve.settings import HttpError

if TYPE_CHECKING:
    import openvino as ov
    from pydantic import BaseModel

    from ovforge.contracts import TaskExtension

__all__ = ["Loadable", "Model", "Pipelines", "Served", "is_config", "resident_memory"]

_VIRTUAL = ("AUTO", "HETERO", "MULTI")
"""OpenVINO's devices that stand for others."""


@dataclass(eq=False, kw_only=True)
class Loadable:
    """Something with a name that is loaded when it is first needed; what is not loaded has no `content`."""

    name: str
    width: int = 1
    """Calls that run at the same time."""

    content: Any = None
    uses: int = 0
    used: float = 0.0
    size: int = 0
    """Bytes by which memory grew when it was loaded the last time."""
    loading: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """The threads that its calls run in."""
        return ThreadPoolExecutor(self.width, thread_name_prefix=self.name)

    def load(self, plugins: Plugins, cache: Cache | str | None) -> Any:
        """Return the content, ready to be used."""
        raise NotImplementedError


@dataclass(eq=False, kw_only=True)
class Served(Loadable):
    """A pipeline with a name."""

    config: PipelineConfig
    base: Path
    task: TaskExtension

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline, if it is loaded."""
        return cast("Pipeline | None", self.content)

    @cached_property
    def inputs(self) -> type[BaseModel]:
        """What a call takes."""
        return self.task.inputs_model()

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of what a call takes."""
        return self.inputs.model_json_schema()

    def load(self, plugins: Plugins, cache: Cache | str | None) -> Pipeline:
        """Return the pipeline when all is compiled."""
        pipeline = Pipeline.from_config(self.config, base=self.base, plugins=plugins, cache=cache)
        pipeline.start_timings()  # waits for the compilations
        return pipeline


@dataclass(eq=False, kw_only=True)
class Model(Loadable):
    """The models of a file or folder, by role, each compiled for a device, with one request each."""

    source: str
    device: str = "CPU"

    def load(self, plugins: Plugins, cache: Cache | str | None) -> dict[str, ov.InferRequest]:
        """Return role -> a request."""
        bundle = open_model(self.source, cache=cache, plugins=plugins)
        return {role: _compiled(bundle.models[role], self.device, f"{self.source}: {role}") for role in bundle.models}


class Pipelines(Mapping[str, Served]):
    """Pipelines by name, and beside them `models`. `say` is told of loading and releasing."""

    def __init__(
        self,
        places: Sequence[str],
        *,
        overrides: Sequence[str] = (),
        memory: int | None = None,
        threads: int = 1,
        cache: Cache | str | None = "default",
        device: str = "CPU",
        say: Callable[..., None] = lambda *_, **__: None,
        plugins: Plugins | None = None,
    ) -> None:
        _check_device(device)
        self._plugins = plugins or Plugins()
        self._memory, self._cache, self._say = memory, cache, say
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        self.models: dict[str, Model] = {}
        for place in places:
            name, source = split_name(place)
            if name in self._served or name in self.models:
                raise ConfigError(f"two are called {name!r}", where=place, hint="Write NAME=CONFIG for one of them.")
            if is_config(source):
                self._served[name] = self._read(name, Path(source), overrides, threads)
            else:
                find_loader(source, plugins=self._plugins)
                self.models[name] = Model(name=name, source=source, device=device)

    def all(self) -> list[Loadable]:
        """Return pipelines and models."""
        return [*self._served.values(), *self.models.values()]

    def load_all(self) -> None:
        """Load what is not loaded yet."""
        for served in self.all():
            with self.use(served):
                pass

    def _read(self, name: str, path: Path, overrides: Sequence[str], threads: int) -> Served:
        """Read a config, and check all that it says without loading a model."""
        from ovforge import plan

        config = PipelineConfig.read(path, overrides)
        if config.task is None:
            raise ConfigError("`task` is missing", where=str(path), hint="Say what the pipeline is for: task = ...")
        task: Any = self._plugins.find("task", config.task.use).extension
        plan(path, overrides=overrides, plugins=self._plugins, cache=self._cache)
        return Served(name=name, config=config, base=path.parent, task=task, width=threads if task.threads else 1)

    @contextlib.contextmanager
    def use(self, served: Loadable) -> Iterator[Any]:
        """Give the content, loaded; it is not released while the block runs. Call it in a thread of its own.

        Raises HttpError if it cannot be loaded, which says no more: the reason may name the server's files.
        """
        with self._lock:
            served.uses += 1
        try:
            with served.loading:
                content = served.content or self._load(served)
            yield content
        finally:
            with self._lock:
                served.uses -= 1
                served.used = time.monotonic()

    def _load(self, served: Loadable) -> Any:
        self._make_room(served, served.size)
        before, start = resident_memory(), time.perf_counter()
        try:
            content = served.content = served.load(self._plugins, self._cache)
        except OvforgeError as error:
            self._say("failed", name=served.name, error=str(error))
            raise HttpError(503, f"{served.name} cannot be loaded", hint="The server's log says why.") from error
        served.size = max(0, resident_memory() - before)
        self._say("loaded", name=served.name, seconds=round(time.perf_counter() - start, 3), bytes=served.size)
        self._make_room(served, 0)
        return content

    def _make_room(self, wanted: Loadable, more: int) -> None:
        """Release what rests until `more` bytes fit below the limit, or nothing rests any more."""
        while self._memory is not None and resident_memory() + more > self._memory:
            with self._lock:
                resting = [one for one in self.all() if one.content and not one.uses and one is not wanted]
                if not resting:
                    return
                oldest = min(resting, key=lambda one: one.used)
                oldest.content = None
            _return_memory()
            self._say("released", name=oldest.name, bytes=resident_memory())

    def release(self, served: Loadable) -> bool:
        """Release what is loaded; say whether it could be, since what is in use cannot."""
        with self._lock:
            if served.uses:
                return False
            served.content = None
        _return_memory()
        self._say("released", name=served.name, bytes=resident_memory())
        return True

    def close(self) -> None:
        """Wait for what still runs, and release all."""
        for served in self.all():
            served.threads.shutdown()
            served.content = None

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)


def _compiled(model: ov.Model, device: str, where: str) -> ov.InferRequest:
    try:
        return core().compile_model(model, device).create_infer_request()
    except OPENVINO_ERRORS as error:
        raise DeviceError(f"it does not compile: {reason_of(error)}", where=f"{where} on {device}") from error


def _check_device(device: str) -> None:
    """Raise DeviceError if a device, or one of AUTO:GPU,CPU, is not here."""
    here = core().available_devices
    for name in re.split(r"[:,]", device):
        if name not in ("AUTO", "HETERO", "MULTI") and not any(
            one == name or one.startswith(f"{name}.") for one in here
        ):
            raise DeviceError(
                f"{name!r} is not on this machine, or its driver is missing", where="--device",
                hint=f"Here are: {', '.join(here) or 'none'}.",
            )  # fmt: skip


def absolute(place: str) -> str:
    """Return "NAME=PLACE" for another process: a path starts at the root; what is not one, as package:..., stays."""
    name, source = split_name(place)
    return f"{name}={Path(source).absolute() if Path(source).exists() else source}"


def is_config(place: str) -> bool:
    """Say whether a place is a pipeline's config; anything else is a model."""
    return Path(place).suffix.lower() in (".toml", ".json")


def resident_memory() -> int:
    """Return the bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def _return_memory() -> None:
    """Give back to the system what was freed: glibc keeps it otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
