"""Processes of this machine that work on a batch, each with the pipeline loaded once."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovforge.errors import OvforgeError, PluginError
from ovforge.store import run_python
from ovforge_batch.items import Item, seed_of

__all__ = ["Engine", "Order", "Outcome"]


@dataclass(frozen=True)
class Order:
    """What all items have in common."""

    config: Path
    overrides: tuple[str, ...]
    folder: Path
    suffix: str
    seed: int
    retries: int
    cache: str | None = "default"


@dataclass(frozen=True)
class Outcome:
    """What became of an item: `answer` is the worker's, of the last of `attempts` tries."""

    item: Item
    answer: Mapping[str, Any]
    attempts: int


class Engine:
    """Runs items in `count` processes, in a `with` block; a process that dies is started again."""

    def __init__(self, order: Order, count: int) -> None:
        self._order, self._count = order, count
        self._local = threading.local()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Engine:
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="batch")
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def run(self, items: Iterator[Item]) -> Iterator[Outcome]:
        """Yield outcomes as they come; only as many items are read as there are processes, and one more each.

        Raises PluginError if the pipeline cannot be loaded.
        """
        waiting: set[Future[Outcome]] = set()
        for item in items:
            waiting.add(self._threads.submit(self._try, item))
            if len(waiting) >= 2 * self._count:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (each.result() for each in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (each.result() for each in done)

    def _try(self, item: Item) -> Outcome:
        if item.problem is not None:
            return Outcome(item, {"error": item.problem}, 0)
        attempts = 1
        while (answer := self._worker().ask(item)).get("again") and attempts <= self._order.retries:
            attempts += 1
        return Outcome(item, answer, attempts)

    def _worker(self) -> _Worker:
        """Return this thread's process, a new one if it has died."""
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None or worker.dead:
            worker = self._local.worker = _Worker(self._order)
            self._workers.append(worker)
        return worker


class _Worker:
    """One process. A thread waits for its end; its standard input and output are pipes of ours."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.dead = False
        theirs, ours = os.pipe()
        mine, writes = os.pipe()
        self._to, self._from = os.fdopen(ours, "w", encoding="utf-8"), os.fdopen(mine, encoding="utf-8")
        self._thread = threading.Thread(target=self._live, args=(theirs, writes), daemon=True)
        self._thread.start()
        told = {"config": str(order.config.absolute()), "overrides": list(order.overrides), "cache": order.cache}
        first = self._asked(told)
        if not first.get("ready"):
            self.end()
            why = first.get("refused") or "a process of the batch died while it loaded the pipeline"
            raise PluginError(str(why), where=str(order.config))

    def ask(self, item: Item) -> Mapping[str, Any]:
        """Return what came of an item; a process that dies over it says that another try may help."""
        order = self._order
        target = order.folder / f"{item.id}{order.suffix}"
        told = {
            "inputs": item.inputs,
            "seed": seed_of(order.seed, item.id),
            "file": str(target),
            "folder": str(order.folder),
        }
        return self._asked(told)

    def end(self) -> None:
        """Let the process end when it has done what it does."""
        self.dead = True
        with contextlib.suppress(OSError):
            self._to.close()
        self._thread.join()
        self._from.close()

    def _asked(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
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
