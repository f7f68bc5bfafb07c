"""Trials, each in a process of its own; what was measured before is found in the cache."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovforge.errors import InputError, OvforgeError
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
    """The [quality] of finalists; None if nothing here reads it."""
    metric: str = ""
    fresh: int = 0
    """Trials that were not in the cache."""
    spent: float = 0.0
    """Seconds that those took."""
    began: float = field(default_factory=time.monotonic)
    _facts: dict[str, Any] = field(default_factory=dict)

    def left(self, part: float = 1.0) -> float:
        """Return the seconds that are left of a part of the time; infinite if there is no limit."""
        return float("inf") if self.within is None else self.began + part * self.within - time.monotonic()

    def begin(self) -> dict[str, Any]:
        """Load the original pipeline and return what it depends on. Raises what its config has wrong."""
        facts = self._run(self._job(self.config, 0), "original")
        self._facts = {name: facts["provenance"][name] for name in ("config", "versions", "digests", "device")}
        return facts

    def measure(self, changes: Sequence[Change], calls: int, *, again: bool = False) -> Trial:
        """Return the trial of the original with `changes`, over so many calls; `again` measures what is stored anew.

        What it cannot do is told in `Trial.error`; KeyboardInterrupt passes.
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
            if not changes:
                raise InputError(
                    "the time is over before the original is measured", where="--within", hint="Give it more time."
                ) from None
            return Trial(label=label_of(changes), calls=calls, error="it takes longer than the time that was left")
        except OvforgeError as error:
            if not changes:
                raise
            label = label_of(changes)
            place = "" if error.where in (None, "", label) else f"{error.where}: "
            return Trial(
                label=label, changes=tuple(change.as_json() for change in changes), calls=calls,
                error=f"{place}{error.what}",
            )  # fmt: skip
        finally:
            self.fresh, self.spent = self.fresh + 1, self.spent + time.monotonic() - start
        if self.cache is not None and not again:
            text = json.dumps({**trial.model_dump(mode="json"), "metric": self.metric})
            self.cache.put(
                key, lambda folder: (folder / _FILE).write_text(text, encoding="utf-8"), label="tuning trial"
            )
        return trial

    def knows(self, changes: Sequence[Change], calls: int) -> bool:
        """Say whether a trial is in the cache, so that it costs no time."""
        return self.cache is not None and self.cache.get(self._key(changes, calls)) is not None

    def passes_gate(self, changes: Sequence[Change]) -> str:
        """Build the pipeline with its gate, as `ovforge run` will; return why it does not pass, or ""."""
        if self.gate is None or not any(change.kind in ("quantizer", "transform") for change in changes):
            return ""
        config = {**changed(self.config, changes), "quality": dict(self.gate)}
        try:
            self._run(self._job(config, 0), label_of(changes))
        except subprocess.TimeoutExpired:
            return "the gate takes longer than the time that was left"
        except OvforgeError as error:
            # A transform that is exact has no gate to pass, and says so.
            return "" if "there is none" in error.what else error.what
        return ""

    def _measured(self, changes: Sequence[Change], calls: int) -> Trial:
        label, config = label_of(changes), changed(self.config, changes)
        job = self._job(config, calls)
        if changes:
            job["reference"] = str(self._reference(calls))
        else:
            job["results"] = str(self._file(calls))
        if any(change.kind in ("quantizer", "transform") for change in changes):
            self._run(self._job(config, 0), label)  # made and stored, so that its memory is not measured
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
            "cache": self.cache is not None,
        }  # fmt: skip

    def _run(self, job: Mapping[str, Any], label: str) -> dict[str, Any]:
        left = self.left()
        return in_process(job, label, timeout=None if left == float("inf") else max(left, 1.0))

    def _key(self, changes: Sequence[Change], calls: int) -> dict[str, Any]:
        return {
            "stage": "tuning trial", **self._facts, "changes": [change.as_json() for change in changes],
            "calls": calls, "prompts": list(self.prompts), "aim": self.aim, "metric": self.asked_metric,
            "input": self.config.get("input", {}), "calibration": self.config.get("calibration", {}),
            "machine": machine().model_dump(mode="json"),
        }  # fmt: skip
