"""Trials, each in a process of its own; what was measured before is found in the cache."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovforge.errors import CacheError, InputError, OvforgeError
from ovforge.store import Cache
from ovforge_benchmark.machine import machine
from ovforge_benchmark.process import in_process
from ovforge_benchmark.tuning.changes import Change, changed, label_of
from ovforge_benchmark.tuning.schema import Aim, Trial

__all__ = ["Bench"]

_FILE = "trial.json"


@dataclass
class Bench:
    """Measures one pipeline with changes. `scratch` is a folder for results that are compared."""

    config: Mapping[str, Any]
    base: Path
    samples: int
    aim: Aim
    scratch: Path
    prompts: Sequence[str] = ()
    asked_metric: str | None = None
    cache: Cache | None = None
    within: float | None = None
    """Seconds that all of it may take."""
    gate: Mapping[str, Any] | None = None
    """The [quality] of finalists; None if there is none."""
    gate_stays: bool = False
    """Whether it is the config's own, which whatever is written keeps."""
    metric: str = ""
    fresh: int = 0
    """Trials that were not in the cache."""
    notes: list[str] = field(default_factory=list)
    """What people should know of the trials."""
    spent: float = 0.0
    """Seconds that those took."""
    began: float = field(default_factory=time.monotonic)
    _facts: dict[str, Any] = field(default_factory=dict)
    _inputs: list[Any] = field(default_factory=list)
    """What each call depends on, with files by their content."""
    _calibration: dict[str, Any] = field(default_factory=dict)
    """What calibration depends on, likewise."""

    def left(self, part: float = 1.0) -> float:
        """Return the seconds that are left of a part of the time; infinite if there is no limit."""
        return float("inf") if self.within is None else self.began + part * self.within - time.monotonic()

    def begin(self) -> dict[str, Any]:
        """Load the original pipeline and return what it depends on. Raises what its config has wrong."""
        try:
            facts = self._run({**self._job(self.config, 0), "describe": self.samples}, "original")
        except subprocess.TimeoutExpired:
            raise InputError(
                "the time is over before the original is loaded", where="--within", hint="Give it more time."
            ) from None
        except InputError as error:
            raise _of_original(error) from None
        self._inputs, self._calibration = facts["inputs"], facts["calibration"]
        self._facts = {name: facts["provenance"][name] for name in ("config", "versions", "digests", "device")}
        return facts

    def measure(self, changes: Sequence[Change], calls: int, *, again: bool = False) -> Trial:
        """Return the trial of the original with `changes`, over so many calls; `again` measures what is stored anew.

        What it cannot do is told in `Trial.error`, and that there was no time left. What is wrong with the original is
        raised; KeyboardInterrupt passes.
        """
        key = self._key(changes, calls)
        if self.cache is not None and not again and (entry := self.cache.get(key)) is not None:
            stored = json.loads(entry.checked(_FILE).read_text(encoding="utf-8"))
            self.metric = stored.pop("metric")
            return Trial(**stored)
        start = time.monotonic()
        try:
            trial = self._measured(changes, calls)
        except subprocess.TimeoutExpired:
            return self._failed(changes, calls, "it takes longer than the time that was left")
        except OvforgeError as error:
            if not changes:
                raise _of_original(error) if isinstance(error, InputError) else error from None
            place = (error.where or "").removeprefix(label_of(changes)).removeprefix(": ")
            return self._failed(changes, calls, f"{place}: {error.what}" if place else error.what)
        finally:
            self.fresh, self.spent = self.fresh + 1, self.spent + time.monotonic() - start
        if self.cache is not None and not again:
            self._store(self.cache, key, trial)
        return trial

    def _store(self, cache: Cache, key: Mapping[str, Any], trial: Trial) -> None:
        """Remember a trial. What was measured counts in this tuning even if there is no room for it."""
        text = json.dumps({**trial.model_dump(mode="json"), "metric": self.metric})
        try:
            cache.put(key, lambda folder: (folder / _FILE).write_text(text, encoding="utf-8"), label="tuning trial")
        except CacheError as error:
            self.notes.append(f"not all trials could be stored, so that another tuning measures them again: {error}")

    def knows(self, changes: Sequence[Change], calls: int) -> bool:
        """Say whether a trial is in the cache, so that it costs no time."""
        return self.cache is not None and self.cache.get(self._key(changes, calls)) is not None

    def passes_gate(self, changes: Sequence[Change]) -> str:
        """Build the pipeline with its gate, as `ovforge run` will; return why it does not pass, or ""."""
        if (gate := self.gate_of(changes)) is None:
            return ""
        # What it saves of a pipeline that does not pass is not left beside the user's config.
        config = {**changed(self.config, changes), "quality": {**gate, "save": str(self.scratch / "quality")}}
        try:
            self._run(self._job(config, 0), label_of(changes))
        except subprocess.TimeoutExpired:
            return "the gate takes longer than the time that was left"
        except OvforgeError as error:
            return error.what
        return ""

    def gate_of(self, changes: Sequence[Change]) -> Mapping[str, Any] | None:
        """Return the [quality] of the original with `changes`; None if it needs none."""
        return self.gate if self.gate_stays or any(change.approximates for change in changes) else None

    def _failed(self, changes: Sequence[Change], calls: int, error: str) -> Trial:
        made = tuple(change.as_json() for change in changes)
        return Trial(label=label_of(changes), changes=made, calls=calls, error=error)

    def _measured(self, changes: Sequence[Change], calls: int) -> Trial:
        label, config = label_of(changes), changed(self.config, changes)
        job = self._job(config, calls)
        if changes:
            job["reference"] = str(self._reference(calls))
        else:
            job["results"] = str(self._file(calls))
        made = any(change.kind in ("quantizer", "transform") for change in changes)
        if made or (changes and self.aim == "memory"):
            self._run(self._job(config, 0), label)  # made, compiled and stored, so that this memory is not measured
        facts = self._run(job, label)
        self.metric = facts["metric"]
        if facts["empty"]:
            raise InputError("the pipeline finds nothing with any input: that says nothing of quality", where=label)
        return Trial(
            label=label,
            changes=tuple(change.as_json() for change in changes),
            calls=calls,
            seconds=facts["seconds"],
            stages=facts["stages"],
            memory=facts["memory"],
            scores=tuple(facts["scores"]),
            roles=tuple(facts["roles"]),
            warnings=tuple(dict.fromkeys([*facts["warnings"], *facts["noise"]])),
        )

    def _reference(self, calls: int) -> Path:
        """Return the file of the original's results, made if need be: a tuning that goes on has none yet."""
        file = self._file(calls)
        if not file.exists():
            self._run({**self._job(self.config, calls), "results": str(file)}, "original")
        return file

    def _file(self, calls: int) -> Path:
        return self.scratch / f"original-{calls}"

    def _job(self, config: Mapping[str, Any], calls: int) -> dict[str, Any]:
        return {
            "kind": "trial", "config": config, "base": str(self.base), "calls": calls, "prompts": list(self.prompts),
            "metric": self.asked_metric, "threads": self.aim == "throughput", "results": None, "reference": None,
            "describe": 0,
            "cache": self.cache is not None,
        }  # fmt: skip

    def _run(self, job: Mapping[str, Any], label: str) -> dict[str, Any]:
        left = self.left()
        return in_process(job, label, timeout=None if left == float("inf") else max(left, 1.0))

    def _key(self, changes: Sequence[Change], calls: int) -> dict[str, Any]:
        return {
            "stage": "tuning trial", **self._facts, "changes": [change.as_json() for change in changes],
            "calls": calls, "prompts": list(self.prompts), "aim": self.aim, "metric": self.asked_metric,
            "inputs": self._inputs[:calls], "calibration": self._calibration,
            "machine": machine().model_dump(mode="json"),
        }  # fmt: skip


def _of_original(error: InputError) -> InputError:
    """Return an error of the original's call that says how it is called."""
    hint = "It is called with one example at a time: take from [input] what goes with several."
    return InputError(error.what, where=error.where, hint=f"{error.hint or ''} {hint}".strip())
