"""A batch's processes as Ray's actors: each holds one pipeline, and takes one item at a time."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ovforge.errors import ConfigError, OvforgeError, PluginError
from ovforge_ray.cache import shared_cache

if TYPE_CHECKING:
    from ovforge_ray.engine import BatchOptions

__all__ = ["Processes"]

_LOG = logging.getLogger("ovforge.ray")
_LOOK = 0.5
"""Seconds between looks at a process that has no place yet."""


class Processes:
    """What `ovforge batch` asks for processes. Files of results come back to it: `here` is false."""

    here = False

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 0) / options.cpus))

    def start(self, order: Mapping[str, Any], stopped: Callable[[], bool]) -> _Process:
        """Return a process that is ready; wait for a place in the cluster until `stopped` says yes.

        Raises OSError if it is lost meanwhile, PluginError for what refuses to load.
        """
        if self._options.cache and order["cache"] is None:
            raise ConfigError("cache=URL is given, and --no-cache", where="--engine-option", hint="Leave one out.")
        actor = (
            ray.remote(_Actor)
            .options(max_restarts=0, max_task_retries=0, num_cpus=self._options.cpus, scheduling_strategy="SPREAD")
            .remote(dict(order), self._options.cache)
        )
        ready = actor.load.remote()
        try:
            while not ray.wait([ready], timeout=_LOOK)[0]:
                if stopped():
                    raise ChildProcessError("nobody waits for the process any more")
            told = ray.get(ready)
            if told["refused"]:
                raise PluginError(f"{told['refused']} (on the machine {told['machine']})", where=str(order["where"]))
        except RayTaskError as error:
            ray.kill(actor)
            raise PluginError(_first_line(error.cause or error), where=str(order["where"])) from error
        except RayError as error:
            if isinstance(error, RayActorError) and isinstance(error.__cause__, ImportError):
                raise PluginError(_first_line(error.__cause__), where=str(order["where"])) from error
            raise ChildProcessError("a process of the batch died while it loaded the pipeline") from error
        except BaseException:
            ray.kill(actor)
            raise
        _LOG.info("a process is ready on %s: %s", told["machine"], told["cache"])
        return _Process(actor)


class _Process:
    """One actor, seen from the batch."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.dead = False

    def ask(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what came of an item; a process that is lost over it says that another try may help."""
        try:
            answer: Mapping[str, Any] = ray.get(self._actor.run.remote(dict(item)))
        except RayTaskError as error:
            return {"error": _first_line(error.cause or error), "again": True}
        except RayError as error:
            self.dead = isinstance(error, RayActorError)
            return {"error": "the process that ran it died", "again": True}
        return answer

    def end(self) -> None:
        """End the process at once."""
        self.dead = True
        with contextlib.suppress(RayError):
            ray.kill(self._actor)


class _Actor:
    """The process itself, on some machine of the cluster."""

    def __init__(self, order: Mapping[str, Any], cache: str | None) -> None:
        self._order = order
        self._cache = shared_cache(cache) if cache else None

    def load(self) -> dict[str, Any]:
        """Load the pipeline. Return what refuses, this machine's address, and what the shared cache did."""
        refused = ""
        module, _, name = self._order["runner"].partition(":")
        try:
            self._run = getattr(importlib.import_module(module), name)(self._order, self._cache)
        except OvforgeError as error:
            refused = str(error)
        cache = self._cache.told() if self._cache else "no shared cache"
        return {"refused": refused, "machine": ray.util.get_node_ip_address(), "cache": cache}

    def run(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what came of an item."""
        answer: Mapping[str, Any] = self._run(item)
        return answer


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
