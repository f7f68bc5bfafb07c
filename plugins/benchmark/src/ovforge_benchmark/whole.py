"""Measuring a whole pipeline: every stage, the start, memory, and the layers of each role."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ovforge
from ovforge.config import apply_overrides
from ovforge.contracts import Inference, Observer
from ovforge.errors import InputError
from ovforge.model import PICTURE_SUFFIXES, Timings
from ovforge_benchmark.flags import MODELS_ONLY, refuse
from ovforge_benchmark.machine import machine, peak_memory
from ovforge_benchmark.noise import Watch, disturbances
from ovforge_benchmark.operators import average, operators
from ovforge_benchmark.schema import Benchmark, Operator
from ovforge_benchmark.statistics import histogram, summary, timeline

__all__ = ["is_pipeline", "load", "run_pipeline"]

_CONFIGS = (".toml", ".json", *PICTURE_SUFFIXES)
_RUNS = 10


def is_pipeline(name: str) -> bool:
    """Say whether a name is a config's, or a picture's that carries one."""
    return Path(name).suffix.lower() in _CONFIGS


def load(
    flags: Mapping[str, Any], *overrides: str, observe: Observer | None = None
) -> tuple[ovforge.Pipeline, dict[str, Any]]:
    """Return the pipeline, and the inputs of its calls; -d, -infer_precision, -hint... are settings of its device.

    Raises InputError for flags that only single models have.
    """
    refuse(flags, MODELS_ONLY, "only for single models")
    settings = {
        "infer_precision": "precision", "perf_hint": "hint", "number_threads": "threads", "number_streams": "streams",
    }  # fmt: skip
    given = [f"device.{key}={flags[name]}" for name, key in settings.items() if flags[name] is not None]
    if flags["target_device"] != "CPU":
        given.insert(0, f"device.use={flags['target_device'].lower()}")
    inputs = [text for texts in flags["paths_to_input"] for text in texts]
    if wrong := [text for text in inputs if "=" not in text]:
        raise InputError(f"{wrong[0]!r} is not NAME=VALUE", where="-i", hint="Pipelines take: -i prompt='a cat'")
    pipe = ovforge.load(
        Path(flags["model"]),
        overrides=[*given, *flags["set"], *overrides],
        cache=None if flags["no_cache"] else "default",
        observe=observe,
        trust=True,
    )
    return pipe, apply_overrides({}, inputs)


def run_pipeline(flags: Mapping[str, Any], tell: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> Benchmark:
    """Load, call once, then measure --runs calls, or -t seconds of them; with -pc, count layers in further calls."""
    before = disturbances()
    tell("step", {"step": "load"})
    pipe, inputs = load(flags)
    facts: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": flags["model"],
        "subject": "pipeline",
        "machine": machine(),
        "asked": {"config": pipe.config.as_dict(), "inputs": inputs},
        "ran": {"device": pipe.device_plan.full_name, **{k: str(v) for k, v in pipe.device_plan.properties.items()}},
    }
    if flags["number_iterations"] == 0:
        return Benchmark(**facts, start=_start(pipe), precision=pipe.provenance()["precision"])
    tell("step", {"step": "first call"})
    began = time.perf_counter()
    result = pipe(**inputs)
    start = {**_start(pipe), "first": time.perf_counter() - began}
    # A seed that was drawn is the same in all calls.
    if "seed" in (ran := result.provenance.get("inputs", {})):
        inputs = {**inputs, "seed": ran["seed"]}
    runs = flags["number_iterations"] or (0 if flags["time"] else flags["runs"] or _RUNS)
    totals: list[float] = []
    times: list[float] = []
    all_timings = Timings()
    complete, seconds = True, float(flags["time"] or 0)
    began = time.perf_counter()
    tell("step", {"step": "measure"})
    with Watch() as watch:
        try:
            while len(totals) < runs or time.perf_counter() - began < seconds:
                single = time.perf_counter()
                result = pipe(**inputs)
                now = time.perf_counter()
                totals.append(now - single)
                times.append(now - began)
                all_timings = all_timings.merged(result.timings)
                tell("running", {"iterations": len(totals), "seconds": now - began, "of": seconds,
                                 "throughput": len(totals) / (now - began)})  # fmt: skip
        except KeyboardInterrupt:
            complete = False
    duration = time.perf_counter() - began
    if not totals:
        raise InputError("no call was done", where="-niter, -t", hint="It was interrupted before the first one.")
    peak = peak_memory()
    counted: list[Operator] = []
    if complete and (flags["perf_counts"] or flags["perf_counts_sort"]):
        tell("step", {"step": "count layers"})
        counted = _counted(flags, inputs)
    spent = sum(totals)
    return Benchmark(
        **facts,
        complete=complete,
        precision=result.provenance.get("precision", {}),
        start=start,
        iterations=len(totals),
        duration=duration,
        throughput=len(totals) / duration,
        latency=summary(totals),
        stages={name: summary(spans) for name, spans in all_timings.spans.items()},
        shares={name: sum(spans) / spent for name, spans in all_timings.spans.items()},
        histogram=histogram(totals),
        timeline=tuple(timeline(totals, times)),
        operators=tuple(counted),
        peak_memory=peak,
        energy=watch.energy,
        warnings=tuple(dict.fromkeys([*result.warnings, *before, *watch.warnings()])),
    )


def _start(pipe: ovforge.Pipeline) -> dict[str, float]:
    timings = pipe.start_timings()
    return {name: timings.total(name) for name in timings.spans}


# -- layers -----------------------------------------------------------------------------------------------------------


def _counted(flags: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Operator]:
    """Return the layers of every role, in seconds a call of the pipeline.

    Counting slows a device down: it is done by a pipeline of its own, whose times are not among the measured ones.
    """
    calls = 3
    runs: dict[str, list[list[Operator]]] = {}

    def count(role: str, inference: Inference) -> None:
        runs.setdefault(role, []).append(operators(role, inference.profiling_info))

    pipe, _ = load(flags, "device.properties.PERF_COUNT=true", observe=count)
    pipe(**inputs)
    runs.clear()
    for _ in range(calls):
        pipe(**inputs)
    return [one for role, each in runs.items() for one in average(role, each, len(each) / calls)]
