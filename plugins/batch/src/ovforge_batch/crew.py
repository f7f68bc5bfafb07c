"""A batch's processes at work: each takes the next item when it is free, and one that is lost is replaced.

An item is given out only to a process that is ready, and goes back to the others if its process is lost: a place that
is never filled, or a machine that never comes back, holds no item.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ovforge.errors import OvforgeError, PluginError
from ovforge_batch.engine import BatchEngine, Order, Worker
from ovforge_batch.items import Item
from ovforge_batch.outputs import write_file

__all__ = ["Crew", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What became of an item: `answer` is the runner's, of the last of `attempts` tries."""

    item: Item
    answer: Mapping[str, Any]
    attempts: int


@dataclass(frozen=True)
class _Task:
    item: Item
    told: Mapping[str, Any]
    attempts: int = 0


class Crew:
    """Runs items in `count` processes of an engine, in a `with` block. `told` makes of an item what its process gets.

    An item is tried once and up to `retries` times more, if its inputs are not at fault.
    """

    def __init__(
        self, engine: BatchEngine, order: Order, count: int, retries: int, told: Callable[[Item], Mapping[str, Any]]
    ) -> None:
        self._engine, self._order, self._count, self._retries = engine, order, count, retries
        self._told = told
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Crew:
        self._threads = [threading.Thread(target=self._work, name=f"batch-{n}") for n in range(self._count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for _thread in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def run(self, items: Iterator[Item]) -> Iterator[list[Outcome]]:
        """Yield outcomes as they come; only as many items are read as there are processes, and one more each.

        Raises PluginError if the pipeline cannot be loaded.
        """
        out = 0
        for item in items:
            if item.problem is not None:
                yield [Outcome(item, {"error": item.problem}, 0)]
                continue
            self._tasks.put(_Task(item, self._told(item)))
            out += 1
            if out >= 2 * self._count:
                done = self._ended()
                out -= len(done)
                yield done
        while out:
            done = self._ended()
            out -= len(done)
            yield done

    def _ended(self) -> list[Outcome]:
        """Return what came to an end by now, at least one."""
        ends = [self._ends.get()]
        while not self._ends.empty():
            ends.append(self._ends.get())
        for end in ends:
            if isinstance(end, Exception):
                raise end
        return [end for end in ends if isinstance(end, Outcome)]

    def _work(self) -> None:
        """Work with one process after another until there is nothing to do."""
        worker: Worker | None = None
        try:
            while not self._stopped.is_set():
                worker = worker or self._ready()
                task = self._tasks.get() if worker is not None else None
                if worker is None or task is None:
                    break
                self._try(worker, replace(task, attempts=task.attempts + 1))
                if worker.dead:
                    worker.end()
                    worker = None
        except Exception as error:  # the batch ends with it
            self._ends.put(error)
        finally:
            if worker is not None:
                worker.end()

    def _ready(self) -> Worker | None:
        """Return a process that is ready, or None if none is wanted any more."""
        order = self._order.as_json(here=self._engine.here)
        lost = 0
        while not self._stopped.is_set():
            try:
                return self._engine.start(order, self._stopped.is_set)
            except OSError as error:
                lost += not self._stopped.is_set()
                if lost > self._retries:
                    raise PluginError(f"{error}, {lost} times", where=self._order.where) from error
        return None

    def _try(self, worker: Worker, task: _Task) -> None:
        answer = dict(worker.ask(task.told))
        try:
            for name, data in answer.pop("content", {}).items():
                write_file(self._order.output, name, data)
        except (OvforgeError, OSError) as error:
            answer = {"error": str(error), "again": True}
        if answer.get("again") and task.attempts <= self._retries:
            self._tasks.put(task)
        else:
            self._ends.put(Outcome(task.item, answer, task.attempts))
