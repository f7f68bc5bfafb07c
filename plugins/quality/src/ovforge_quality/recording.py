"""Recorded inputs for quantizers: the pipeline runs on examples, and what its models are given is kept.

One pass serves all roles. What is kept of each is an even draw from all that it was given, at all steps and in both
halves of guidance: reservoir sampling by random priorities, so that a draw depends on the seed and on positions alone,
can go on after an interruption, and a smaller draw is the beginning of a larger one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, overload

from ovforge.contracts import Progress, ignore_progress
from ovforge.errors import CacheError, ModelError, did_you_mean
from ovforge.store import scratch_folder
from ovforge_quality.sections import CalibrationSection

if TYPE_CHECKING:
    import openvino as ov
    from numpy.typing import NDArray

    from ovforge.contracts import QuantizationRun, Task
    from ovforge.model import Protection, Source

__all__ = ["Record", "Recorder", "Records", "Reservoir", "TaskCalibration"]

Record = dict[str, "NDArray[Any]"]
"""Input name -> array of one call of a model."""

LEAST_RUNS = 8
"""Runs of the pipeline that a recording takes in any case: a few runs of many steps would show few subjects."""

_STATE = "calibration.json"
_PURPOSE = "calibration"


# -- where records are kept -------------------------------------------------------------------------------------------


class Store(Protocol):
    """Keeps records by role and position."""

    def put(self, role: str, position: int, record: Record) -> None: ...

    def get(self, role: str, position: int) -> Record: ...

    def drop(self, role: str, position: int) -> None: ...


class MemoryStore:
    """In memory."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], Record] = {}

    def put(self, role: str, position: int, record: Record) -> None:
        self._records[role, position] = record

    def get(self, role: str, position: int) -> Record:
        return self._records[role, position]

    def drop(self, role: str, position: int) -> None:
        del self._records[role, position]


class SourceStore:
    """In a source's files, which stay as they are."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def put(self, role: str, position: int, record: Record) -> None:
        raise AssertionError("what was stored stays as it is")

    def get(self, role: str, position: int) -> Record:
        return _decoded(self._source.read(_file(role, position)), role, self._source.name)

    def drop(self, role: str, position: int) -> None:
        raise AssertionError("what was stored stays as it is")


class TemporaryStore:
    """In files that go when nobody needs them any more; encrypted if there is a protection."""

    def __init__(self, protection: Protection | None) -> None:
        held = contextlib.ExitStack()
        self.root, self._protection = held.enter_context(scratch_folder()), protection
        weakref.finalize(self, held.close)

    def put(self, role: str, position: int, record: Record) -> None:
        if self._protection is not None:
            self._protection.write(self.root, _file(role, position), _encoded(record), _PURPOSE)
            return
        path = self.root / _file(role, position)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(record))

    def get(self, role: str, position: int) -> Record:
        if self._protection is not None:
            data = self._protection.open(self.root, _PURPOSE).read(_file(role, position))
        else:
            data = (self.root / _file(role, position)).read_bytes()
        return _decoded(data, role, str(self.root))

    def drop(self, role: str, position: int) -> None:
        for path in (self.root / role).glob(f"{position}.*"):
            path.unlink()


def _encoded(record: Record) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    data: bytes = save({name: np.asarray(array, order="C") for name, array in record.items()})
    return data


def _decoded(data: bytes, role: str, where: str) -> Record:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        record: Record = load(data)
    except SafetensorError as error:
        raise CacheError(
            f"a record of {role} cannot be read: {error}",
            where=where,
            hint="Run `ovforge cache verify --repair`, and start again.",
        ) from error
    return record


def _file(role: str, position: int) -> str:
    return f"{role}/{position}.safetensors"


class Records(Sequence[Record]):
    """Records of a role in the order of their priorities, read one at a time."""

    def __init__(self, store: Store, role: str, positions: Sequence[int]) -> None:
        self._store, self._role, self._positions = store, role, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self._store, self._role, self._positions[index])
        return self._store.get(self._role, self._positions[index])


# -- what is kept -----------------------------------------------------------------------------------------------------


def priority(seed: int, role: str, position: int) -> bytes:
    """Return the priority of a role's call number `position`; the lowest are kept."""
    return hashlib.blake2b(f"{seed}\0{role}\0{position}".encode(), digest_size=16).digest()


class Reservoir:
    """An even draw of up to `capacity` records of each role, of any number that come by.

    The records with the lowest of independent random priorities are a uniform sample without replacement (Sunter 1977,
    "List sequential sampling with equal or unequal probabilities without replacement"). Records of a run count when
    `commit` says that it is over: an interrupted run leaves no trace.
    """

    def __init__(self, capacity: int, seed: int, store: Store, state: Mapping[str, Any] | None = None) -> None:
        self.capacity, self.seed, self.store = capacity, seed, store
        self.runs: int = state["runs"] if state else 0
        self.total: int | None = state["total"] if state else None
        """The number of runs, once it is known."""
        self.seen: dict[str, int] = dict(state["seen"]) if state else {}
        self.kept: dict[str, list[int]] = {role: list(kept) for role, kept in state["kept"].items()} if state else {}
        self._pending: dict[str, dict[int, Record]] = {}
        self._counts: dict[str, int] = {}

    def count(self, role: str, make: Callable[[], Record]) -> None:
        """Count a call of `role`; what it was given is only copied where it may be kept."""
        position = self.seen.get(role, 0) + self._counts.get(role, 0)
        self._counts[role] = self._counts.get(role, 0) + 1
        kept = self.kept.get(role, [])
        if len(kept) < self.capacity or self._priority(role, position) < self._priority(role, kept[-1]):
            pending = self._pending.setdefault(role, {})
            pending[position] = make()
            if len(pending) > self.capacity:
                del pending[max(pending, key=lambda number: self._priority(role, number))]

    def commit(self) -> None:
        """End a run: its records find their places."""
        for role, count in self._counts.items():
            self.seen[role] = self.seen.get(role, 0) + count
            pending, kept = self._pending.get(role, {}), self.kept.setdefault(role, [])
            both = sorted([*kept, *pending], key=lambda number: self._priority(role, number))
            for position in both[self.capacity :]:
                if position not in pending:
                    self.store.drop(role, position)
            kept[:] = both[: self.capacity]
            for position in kept:
                if position in pending:
                    self.store.put(role, position, pending[position])
        self.runs += 1
        self.forget()

    def forget(self) -> None:
        """Leave out what the run that goes on has given."""
        self._pending, self._counts = {}, {}

    def state(self) -> dict[str, Any]:
        """Return, JSON-able, what goes with the store."""
        return {"runs": self.runs, "total": self.total, "seen": self.seen, "kept": self.kept}

    def records(self, role: str) -> Records:
        """Return what is kept of a role."""
        return Records(self.store, role, self.kept.get(role, []))

    def _priority(self, role: str, position: int) -> bytes:
        return priority(self.seed, role, position)


# -- recording --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorder:
    """Runs a pipeline on examples, and keeps what its models are given.

    `examples(task, count)` gives up to that many inputs; `options` is what they have in common.
    """

    run: QuantizationRun
    examples: Callable[[Task, int], Sequence[Any]]
    options: Mapping[str, Any]
    section: CalibrationSection
    content: Mapping[str, Any]
    """What the recorded inputs depend on, besides the models and who calls them."""

    def record(self) -> Reservoir:
        """Return what is kept of every role, from the cache if it was recorded before.

        An interruption leaves what whole runs gave in the cache, and the next recording goes on from there.
        """
        store, callers = self.run.store, self.run.callers
        if store is None or callers is None:
            return self._fill(self._begun(None))
        dependencies = {"stage": "calibration", **callers, **self.content}
        interrupted = {**dependencies, "stage": "calibration (interrupted)"}

        def write(put: Callable[[str, bytes], None]) -> None:
            reservoir = self._begun(store.find(interrupted))
            try:
                self._fill(reservoir)
            except BaseException:
                reservoir.forget()
                if reservoir.runs:
                    label = f"calibration, {reservoir.runs} runs"
                    store.remove(interrupted)
                    store.make(interrupted, lambda keep: _settle(reservoir, keep), label=label)
                raise
            _settle(reservoir, put)
            store.remove(interrupted)

        return self._opened(store.make(dependencies, write, label="calibration"))

    def _begun(self, stored: Source | None) -> Reservoir:
        """Return a reservoir, with what an interrupted recording left if there is something."""
        store: Store = TemporaryStore(self.run.protection) if self.section.spill else MemoryStore()
        if stored is None:
            return Reservoir(self.section.samples, self.section.seed, store)
        before = self._opened(stored)
        for role, positions in before.kept.items():
            for position in positions:
                store.put(role, position, before.store.get(role, position))
        return Reservoir(self.section.samples, self.section.seed, store, before.state())

    def _opened(self, stored: Source) -> Reservoir:
        state = json.loads(stored.read(_STATE))
        return Reservoir(self.section.samples, self.section.seed, SourceStore(stored), state)

    def _fill(self, reservoir: Reservoir) -> Reservoir:
        """Run until there is enough."""
        task = self.run.start(
            self.run.bundle,
            self.options,
            finish=False,
            observe=lambda role, inference: reservoir.count(role, inference.inputs),
        )
        first, began = reservoir.runs, time.perf_counter()
        reservoir.total = reservoir.total or self.section.runs
        inputs = self.examples(task, reservoir.total or 1)
        while reservoir.runs < (total := min(reservoir.total or 1, len(inputs))):
            done = reservoir.runs
            left = (time.perf_counter() - began) / (done - first) * (total - done) if done > first else None
            self.run.progress(Progress("calibration", done, total, "" if left is None else f"{left:.0f} s left"))
            task(inputs[done], ignore_progress)
            reservoir.commit()
            if reservoir.total is None:
                reservoir.total = self._enough(reservoir)
                inputs = self.examples(task, reservoir.total)
        self.run.progress(Progress("calibration", total, total))
        return reservoir

    def _enough(self, reservoir: Reservoir) -> int:
        """Return how many runs give as many records as are kept of the role that runs most often, after the first."""
        most = max(reservoir.seen.values(), default=0)
        return max(LEAST_RUNS, math.ceil(self.section.samples / most) if most else 1)


def _settle(reservoir: Reservoir, put: Callable[[str, bytes], None]) -> None:
    """Write all that is kept."""
    for role, positions in reservoir.kept.items():
        for position in positions:
            put(_file(role, position), _encoded(reservoir.store.get(role, position)))
    put(_STATE, json.dumps(reservoir.state()).encode())


class TaskCalibration:
    """A `stages.Calibration` that runs the pipeline as it is, before quantization."""

    def __init__(self, recorder: Recorder, score: Callable[[Mapping[str, ov.Model]], float]) -> None:
        self._recorder, self._score = recorder, score
        self._reservoir: Reservoir | None = None

    def inputs(self, role: str, count: int) -> Records:
        """Return up to `count` input sets of `role` by input name, an even draw.

        Raises ModelError if the task never runs that role.
        """
        if self._reservoir is None:
            self._reservoir = self._recorder.record()
        if not (records := self._reservoir.records(role)):
            known = [name for name, kept in self._reservoir.kept.items() if kept]
            raise ModelError(
                f"the task never runs {role!r}, so there is nothing to calibrate it with.{did_you_mean(role, known)}",
                where=role,
                hint=f"It runs: {', '.join(known)}.",
            )
        return records[:count]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        """Return how close results come to the unquantized pipeline's with `models`; higher is better."""
        return self._score(models)
