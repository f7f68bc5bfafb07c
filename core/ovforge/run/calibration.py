"""Recorded inputs for quantizers: the pipeline runs on examples, and what its models are given is kept.

One pass serves all roles. What is kept of each is an even draw from all that it was given, at all steps and in both
halves of guidance: reservoir sampling by random priorities, so that a draw depends on the seed and on positions alone,
can go on after an interruption, and a smaller draw is the beginning of a larger one.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from ovforge.contracts.stages import Progress, ignore_progress
from ovforge.errors import CacheError, ModelError, did_you_mean

if TYPE_CHECKING:
    import openvino as ov
    from numpy.typing import NDArray

    from ovforge.contracts.stages import Task
    from ovforge.model.sources import Protection
    from ovforge.run.compiled import CompiledBundle
    from ovforge.store.cache import Cache

__all__ = ["Record", "Recorder", "Records", "Reservoir", "TaskCalibration"]

Record = dict[str, "NDArray[Any]"]
"""Input name -> array of one call of a model."""

LEAST_RUNS = 8
"""Runs of the pipeline that a recording takes in any case: a few runs of many steps would show few subjects."""

_STATE = "calibration.json"


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


class FolderStore:
    """A safetensors file for each record below `root`, encrypted for `purpose` where there is a protection."""

    def __init__(self, root: Path, protection: Protection | None = None, purpose: str = "") -> None:
        self.root, self._protection, self._purpose = root, protection, purpose

    def put(self, role: str, position: int, record: Record) -> None:
        import numpy as np
        from safetensors.numpy import save

        data = save({name: np.ascontiguousarray(array) for name, array in record.items()})
        if self._protection is not None:
            self._protection.write(self.root, _file(role, position), data, self._purpose)
            return
        path = self.root / _file(role, position)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def get(self, role: str, position: int) -> Record:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            if self._protection is not None:
                data = self._protection.open(self.root, self._purpose).read(_file(role, position))
            else:
                data = (self.root / _file(role, position)).read_bytes()
            return load(data)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"a record of {role} cannot be read: {error}",
                where=str(self.root),
                hint="Run `ovforge cache verify --repair`, and start again.",
            ) from error

    def drop(self, role: str, position: int) -> None:
        for path in (self.root / role).glob(f"{position}.*"):
            path.unlink()


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
        """Runs that there shall be, once that is known."""
        self.seen: dict[str, int] = dict(state["seen"]) if state else {}
        self.kept: dict[str, list[int]] = {role: list(kept) for role, kept in state["kept"].items()} if state else {}
        self._pending: dict[str, dict[int, Record]] = {}
        self._counts: dict[str, int] = {}

    def offer(self, role: str, make: Callable[[], Record]) -> None:
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

    `start` builds compiled models and a function that makes the task on them; `examples(task, count)` gives up to that
    many inputs. `ingredients` is the cache's key of what is recorded, None where there is none.
    """

    start: Callable[[], tuple[CompiledBundle, Callable[[CompiledBundle], Task]]]
    examples: Callable[[Task, int], Sequence[Any]]
    samples: int
    runs: int | None
    seed: int
    spill: bool = False
    cache: Cache | None = None
    ingredients: Mapping[str, Any] | None = None
    protection: Protection | None = None
    progress: Callable[[Progress], None] = ignore_progress

    def record(self) -> Reservoir:
        """Return what is kept of every role, from the cache where it was recorded before.

        An interruption leaves what whole runs gave in the cache, and the next recording goes on from there.
        """
        if self.cache is None or self.ingredients is None:
            store: Store = MemoryStore()
            if self.spill:
                store = _Temporary(self.protection)
            return self._fill(Reservoir(self.samples, self.seed, store))
        cache, key = self.cache, _key(self.ingredients)
        stored = {**self.ingredients, "stage": "calibration (interrupted)"}

        def write(folder: Path) -> None:
            begun = cache.get(stored)
            reservoir = self._begun(folder, key, begun.path if begun else None)
            try:
                self._fill(reservoir)
            except BaseException:
                reservoir.forget()
                if reservoir.runs:
                    cache.remove(_key(stored))
                    label = f"calibration, {reservoir.runs} runs"
                    cache.put(stored, lambda kept: self._settle(reservoir, kept, key), label=label)
                raise
            self._settle(reservoir, folder, key)
            cache.remove(_key(stored))

        entry, _ = cache.get_or_make(self.ingredients, write, label="calibration")
        return self._opened(entry.path, key)

    def _begun(self, folder: Path, key: str, stored: Path | None) -> Reservoir:
        """Return a reservoir, with what an interrupted recording left where there is one."""
        store: Store = FolderStore(folder, self.protection, key) if self.spill else MemoryStore()
        if stored is None:
            return Reservoir(self.samples, self.seed, store)
        before = self._opened(stored, key)
        for role, positions in before.kept.items():
            for position in positions:
                store.put(role, position, before.store.get(role, position))
        return Reservoir(self.samples, self.seed, store, before.state())

    def _settle(self, reservoir: Reservoir, folder: Path, key: str) -> None:
        """Write what is kept into an entry's folder, where it is not there already."""
        import json

        target, source = FolderStore(folder, self.protection, key), reservoir.store
        if not (isinstance(source, FolderStore) and source.root == folder):
            for role, positions in reservoir.kept.items():
                for position in positions:
                    target.put(role, position, source.get(role, position))
        data = json.dumps(reservoir.state()).encode()
        if self.protection is not None:
            self.protection.write(folder, _STATE, data, key)
        else:
            (folder / _STATE).write_bytes(data)

    def _opened(self, folder: Path, key: str) -> Reservoir:
        import json

        sealed = self.protection
        data = sealed.open(folder, key).read(_STATE) if sealed else (folder / _STATE).read_bytes()
        return Reservoir(self.samples, self.seed, FolderStore(folder, sealed, key), json.loads(data))

    def _fill(self, reservoir: Reservoir) -> Reservoir:
        """Run until there is enough."""
        compiled, make_task = self.start()
        lock = threading.Lock()

        def wrap(role: str) -> Callable[[ov.CompiledModel], _Recorded]:
            def offer(make: Callable[[], Record]) -> None:
                with lock:
                    reservoir.offer(role, make)

            return lambda model: _Recorded(model, _names(compiled.source.models[role], model), offer)

        for role in compiled:
            if not role.startswith(("tokenizer", "detokenizer")):  # they take text, and nobody quantizes them
                compiled.wrap(role, wrap(role))
        task = make_task(compiled)
        first, began = reservoir.runs, time.perf_counter()
        reservoir.total = reservoir.total or self.runs
        inputs = self.examples(task, reservoir.total or 1)
        while reservoir.runs < (total := min(reservoir.total or 1, len(inputs))):
            done = reservoir.runs
            left = (time.perf_counter() - began) / (done - first) * (total - done) if done > first else None
            self.progress(Progress("calibration", done, total, "" if left is None else f"{left:.0f} s left"))
            task(inputs[done], ignore_progress)
            reservoir.commit()
            if reservoir.total is None:
                reservoir.total = self._enough(reservoir)
                inputs = self.examples(task, reservoir.total)
        self.progress(Progress("calibration", total, total))
        return reservoir

    def _enough(self, reservoir: Reservoir) -> int:
        """Return how many runs give as many records as are kept of the role that runs most often, after the first."""
        most = max(reservoir.seen.values(), default=0)
        return max(LEAST_RUNS, math.ceil(self.samples / most) if most else 1)


class _Temporary(FolderStore):
    """A folder that goes when nobody needs it any more."""

    def __init__(self, protection: Protection | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ovforge-calibration-", ignore_cleanup_errors=True)
        super().__init__(Path(self._folder.name), protection, "calibration")


def _key(ingredients: Mapping[str, Any]) -> str:
    from ovforge.store.cache import key_of

    return key_of(ingredients)


class TaskCalibration:
    """A `stages.Calibration` that runs the pipeline as it is, before quantization."""

    def __init__(self, recorder: Recorder, score: Callable[[Mapping[str, ov.Model]], float]) -> None:
        self._recorder, self._score = recorder, score
        self._reservoir: Reservoir | None = None

    def inputs(self, role: str, count: int) -> Records:
        """Return up to `count` input sets of `role` by input name, an even draw.

        Raises ModelError where the task never runs that role.
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


Offer = Callable[[Callable[[], Record]], None]


def _names(model: ov.Model, compiled: ov.CompiledModel) -> list[str]:
    """Return the names of a compiled model's inputs in the model that quantizers get: compiling may add others."""
    known = {name for port in model.inputs for name in port.names}
    return [min(port.names & known) for port in compiled.inputs]


class _Recorded:
    """A compiled model whose requests tell what they are given; all else is the model's own."""

    def __init__(self, model: ov.CompiledModel, names: Sequence[str], offer: Offer) -> None:
        self._model, self._names, self._offer = model, names, offer

    def create_infer_request(self) -> _RecordedRequest:
        return _RecordedRequest(self._model.create_infer_request(), self._names, self._offer)

    def __call__(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        return self.create_infer_request().infer(inputs, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _RecordedRequest:
    def __init__(self, request: ov.InferRequest, names: Sequence[str], offer: Offer) -> None:
        self._request, self._names, self._offer = request, names, offer

    def infer(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        results = self._request.infer(inputs, *arguments, **options)
        self._offer(self._record)
        return results

    def wait(self) -> None:
        self._request.wait()
        self._offer(self._record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    def _record(self) -> Record:
        # After the run: its inputs are set by then, however the caller sets them, and a run leaves them as they are.
        ports = self._request.model_inputs
        return {name: self._request.get_tensor(port).data.copy() for name, port in zip(self._names, ports, strict=True)}
