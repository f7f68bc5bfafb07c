"""The processes of a batch: on this machine, or wherever an engine of a plugin has them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ovforge.config import PipelineConfig
from ovforge.errors import OvforgeError, PluginError
from ovforge.store import run_python
from ovforge_batch.outputs import Remote

__all__ = ["BatchEngine", "Embedded", "Order", "Worker"]


class Worker(Protocol):
    """A process with the pipeline loaded. It is asked one thing at a time."""

    dead: bool
    """Whether it is lost, so that another one has to be started."""

    def ask(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the runner made of an item; if the process is lost over it, {"error": ..., "again": True}."""

    def end(self) -> None:
        """Let the process end."""


class BatchEngine(Protocol):
    """What `ovforge batch` asks of an engine: its method `batch` returns one of these.

    `start` makes a process in which `order["runner"]`, an import string, is called with the order, and the object that
    this returns with each item. It may wait for a free place for as long as `stopped` says no; then, and if the process
    dies meanwhile, it raises OSError. What the runner raises as an OvforgeError, it raises.
    """

    workers: int
    """How many processes have a place now."""
    here: bool
    """Whether its processes are this machine's, and write to its folders."""

    def start(self, order: Mapping[str, Any], stopped: Callable[[], bool]) -> Worker:
        """Return a process that is ready."""


@dataclass(frozen=True)
class Order:
    """What all items of a batch have in common. Paths start at `base`."""

    config: PipelineConfig
    where: str
    base: Path
    output: Path | Remote
    cache: str | None = "default"

    def as_json(self, *, here: bool) -> dict[str, Any]:
        """Return it for a process, which is this machine's or not. Without folder and URL, it returns the files."""
        output = self.output
        return {
            "runner": "ovforge_batch.runner:Runner",
            "config": self.config.as_dict(),
            "where": self.where,
            "base": str(self.base.absolute()),
            "cache": self.cache,
            "folder": str(output.resolve()) if isinstance(output, Path) and here else None,
            "url": output.url if isinstance(output, Remote) and output.is_shared else None,
        }


class Embedded:
    """Processes of this machine."""

    workers, here = 1, True

    def start(self, order: Mapping[str, Any], stopped: Callable[[], bool]) -> Worker:
        """Return a process that is ready."""
        return _Process(order)


class _Process:
    """One process. A thread waits for its end; its standard input and output are pipes of ours."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.dead = False
        theirs, ours = os.pipe()
        mine, writes = os.pipe()
        self._to, self._from = os.fdopen(ours, "w", encoding="utf-8"), os.fdopen(mine, encoding="utf-8")
        self._thread = threading.Thread(target=self._live, args=(theirs, writes), daemon=True)
        self._thread.start()
        first = self._asked(order)
        if not first.get("ready"):
            self.end()
            if "refused" in first:
                raise PluginError(str(first["refused"]), where=str(order["where"]))
            raise ChildProcessError("a process of the batch died while it loaded the pipeline")

    def ask(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what came of an item; a process that dies over it says that another try may help."""
        answer = self._asked(item)
        if "content" in answer:
            answer["content"] = {name: base64.b64decode(text) for name, text in answer["content"].items()}
        return answer

    def end(self) -> None:
        """Let the process end when it has done what it does."""
        self.dead = True
        with contextlib.suppress(OSError):
            self._to.close()
        self._thread.join()
        self._from.close()

    def _asked(self, told: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._to.write(json.dumps(told) + "\n")
            self._to.flush()
            line = self._from.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            self.dead = True
            return {"error": "the process that ran it died", "again": True}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _live(self, reads: int, writes: int) -> None:
        try:
            run_python(["-m", "ovforge_batch.worker"], stdin=reads, stdout=writes)
        except (OSError, OvforgeError):
            self.dead = True
        finally:
            os.close(reads)
            os.close(writes)
