"""One process that measures one pipeline: `python -m ovforge_benchmark.worker ANSWER`, the job on standard input."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ovforge
from ovforge.errors import OvforgeError
from ovforge.model import Result
from ovforge.store import end_with_parent, scratch_folder
from ovforge_benchmark.machine import peak_memory
from ovforge_benchmark.noise import Watch
from ovforge_benchmark.process import answer, hand_over

__all__ = ["main", "measure_pipeline"]


def measure_pipeline(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load the pipeline, warm up, run every call `runs` times; times are seconds, one a call.

    The job: `config` (a path or a dict), `overrides`, `calls` (inputs of each), `warmup`, `runs`, `seed` (of calls that
    have none), `results` (a file to hand them over in, or None), `sizes` (whether to weigh the models), `cache`.
    """
    cache = "default" if job["cache"] else None
    config = Path(job["config"]) if isinstance(job["config"], str) else job["config"]
    pipe = ovforge.load(config, overrides=job["overrides"], cache=cache, trust=True)
    stages = {"load": [pipe.timings.total("load")]}
    calls = [_with_seed(pipe, call, job["seed"]) for call in job["calls"]]
    results: list[Result] = []
    for number in range(job["warmup"]):
        results = []
        for call in calls:
            seconds, result = _timed(pipe, call)
            results.append(result)
            if number == 0:
                stages.setdefault("first call", []).append(seconds)
    stages["compile"] = [pipe.start_timings().total("compile")]
    with Watch() as watch:
        for _ in range(job["runs"]):
            results = []
            for call in calls:
                seconds, result = _timed(pipe, call)
                results.append(result)
                stages.setdefault("total", []).append(seconds)
                for name in result.timings.spans:
                    stages.setdefault(name, []).append(result.timings.total(name))
    peak = peak_memory()
    messages = [warning for result in results for warning in result.warnings]
    if job["results"]:
        hand_over(results, Path(job["results"]))
    return {
        "stages": stages,
        "peak_memory": peak,
        "precision": results[0].provenance.get("precision", {}) if results else {},
        "provenance": pipe.provenance(),
        "inputs": [result.provenance.get("inputs", {}) for result in results],
        "sizes": _sizes(pipe) if job["sizes"] else {},
        "warnings": list(dict.fromkeys(messages)),
        "noise": watch.warnings(),
    }


def _timed(pipe: ovforge.Pipeline, call: Mapping[str, Any]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = pipe(**call)
    return time.perf_counter() - start, result


def _with_seed(pipe: ovforge.Pipeline, call: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """Give a call the common seed, where its task has seeds and nobody says which."""
    known = pipe.inputs_model.model_fields
    if seed is None or "seed" not in known or "seed" in call or "seed" in pipe.config.input:
        return dict(call)
    return {**call, "seed": seed}


def _sizes(pipe: ovforge.Pipeline) -> dict[str, int]:
    """Return role -> bytes of its model files: as they lie there, or as they would once written."""
    sizes = {}
    for role in pipe.compiled:
        xml = pipe.bundle.location.get(role)
        if xml is not None and xml.exists():
            sizes[role] = sum(file.stat().st_size for file in (xml, xml.with_suffix(".bin")) if file.exists())
        elif pipe.bundle.protection is None:
            with scratch_folder() as scratch:
                written = pipe.bundle.write_model(role, scratch)
                sizes[role] = sum(file.stat().st_size for file in written.parent.iterdir())
                pipe.bundle.models.release(role)
    return sizes


def main() -> None:
    """Do the job on standard input; nobody waits for it any more when the parent is gone."""
    end_with_parent()
    target = Path(sys.argv[1])
    job = json.load(sys.stdin)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            measured = _measure(job)
        messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        measured["warnings"] = list(
            dict.fromkeys([*measured["warnings"], *(messages if job["kind"] == "pipeline" else ())])
        )
        answer(target, measured)
    except OvforgeError as error:
        answer(target, error)


def _measure(job: Mapping[str, Any]) -> dict[str, Any]:
    if job["kind"] == "diffusers":
        from ovforge_benchmark.peer import measure_diffusers

        return measure_diffusers(job)
    if job["kind"] == "trial":
        from ovforge_benchmark.tuning.worker import measure_trial

        return measure_trial(job)
    return measure_pipeline(job)


if __name__ == "__main__":
    main()
