"""What one process does for `ovforge tune`: load a pipeline, call it on the task's examples, compare the results."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ovforge
from ovforge.config import checked, input_content
from ovforge.errors import ConfigError
from ovforge.model import OWN_METRIC, Result
from ovforge.store import digest_file
from ovforge_benchmark.machine import cores, peak_memory
from ovforge_benchmark.noise import Watch
from ovforge_benchmark.process import hand_over, take_over

__all__ = ["measure_trial"]


def measure_trial(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job: `config`, `base`, `calls`, `prompts`, `metric`, `threads`, `results`, `reference`, `describe`.

    `calls` says how many; 0 only loads, and tells what so many calls as `describe` says depend on (`inputs`), what
    calibration does, and which inputs examples name (`examples`). `results` is a file for the results, `reference` one
    that holds those to compare with; each may be None. With `threads`, the calls are made from as many threads as there
    are processors, and a call's time is a share of the whole.
    """
    config = ovforge.PipelineConfig.of(job["config"])
    pipe = ovforge.Pipeline.from_config(config, base=Path(job["base"]), cache="default" if job["cache"] else None)
    facts = {
        "provenance": pipe.provenance(),
        "roles": sorted({role for report in pipe.reports if report.layers for role in report.roles}),
        "outcome": str(pipe.outcome) if pipe.outcome else "",
        "warnings": pipe.warnings(),
    }
    if not job["calls"]:
        return {**facts, **_described(pipe, job)} if job["describe"] else facts
    prompts = job["prompts"][: job["calls"]]
    calls = _calls(pipe, prompts, [] if prompts else _examples(pipe, job["calls"]))
    first: Result = pipe(**calls[0])
    with Watch() as watch:
        results, seconds = _together(pipe, calls) if job["threads"] else _in_turn(pipe, calls)
    peak = peak_memory()
    if job["results"]:
        hand_over(results, Path(job["results"]))
    metric = job["metric"] or _metric(pipe, first)
    reference = take_over(Path(job["reference"])) if job["reference"] else results
    stages = {name for result in results for name in result.timings.spans if "." not in name}
    return {
        **facts,
        "seconds": seconds,
        "stages": {name: statistics.median(one.timings.total(name) for one in results) for name in sorted(stages)},
        "memory": peak,
        "metric": metric,
        "empty": all(result.is_empty() for result in results),
        "scores": [_score(pipe, metric, ours, theirs) for ours, theirs in zip(results, reference, strict=False)],
        "noise": watch.warnings(),
    }


def _described(pipe: ovforge.Pipeline, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return what calls and calibration depend on, files by their content, and which inputs examples name."""
    examples = _examples(pipe, job["describe"])
    calls = _calls(pipe, job["prompts"][: job["describe"]], examples)
    whole = [checked(pipe.inputs_model, {**pipe.config.input, **call}, where="input", base=pipe.base) for call in calls]
    driver = pipe.resolved.driver
    return {
        "inputs": [input_content(one) for one in whole],
        "calibration": dict(driver.content("inputs", digest_file)) if driver else {},
        "examples": sorted({name for example in examples for name in example}),
    }


def _calls(pipe: ovforge.Pipeline, prompts: list[str], examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the inputs of each call: the user's prompts, or else the task's examples."""
    if prompts:
        first, seeded = next(iter(pipe.inputs_model.model_fields)), "seed" in pipe.inputs_model.model_fields
        return [{first: prompt, **({"seed": 2 * n + 1} if seeded else {})} for n, prompt in enumerate(prompts)]
    if not examples:
        raise ConfigError(
            "the task has no examples to try a pipeline with", where="tune", hint="Give some: --prompt TEXT"
        )
    return examples


def _examples(pipe: ovforge.Pipeline, count: int) -> list[dict[str, Any]]:
    """Return what up to `count` examples of the task say, of those that calibration does not see.

    Of a task that makes things, the config's own pictures and conditions stay, so that it is measured with their sizes.
    Examples of a task that looks for things say what is in their picture, and stay whole.
    """
    fields = pipe.inputs_model.model_fields
    own = set(pipe.config.input) - {next(iter(fields)), "seed"} if "seed" in fields else set()
    examples = pipe.task.examples(2 * count)[1::2]
    return [{name: getattr(one, name) for name in one.model_fields_set - own} for one in examples[:count]]


def _in_turn(pipe: ovforge.Pipeline, calls: list[dict[str, Any]]) -> tuple[list[Result], float]:
    results, times = [], []
    for call in calls:
        start = time.perf_counter()
        results.append(pipe(**call))
        times.append(time.perf_counter() - start)
    return results, statistics.median(times)


def _together(pipe: ovforge.Pipeline, calls: list[dict[str, Any]]) -> tuple[list[Result], float]:
    """Return the result of each call, and the seconds of one as a share of the whole.

    If the task serves threads side by side, all of them are kept busy, however few the calls are, and each has its
    requests before: settings that are good for many at a time would lose otherwise.
    """
    threads, task = max(cores(), 2), pipe.resolved.task
    assert task is not None
    often = math.ceil(2 * threads / len(calls)) if task.extension.threads else 1
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2 if task.extension.threads else 1):
            start = time.perf_counter()
            results = list(pool.map(lambda call: pipe(**call), calls * often))
            seconds = time.perf_counter() - start
    return results[: len(calls)], seconds / len(results)


def _metric(pipe: ovforge.Pipeline, result: Result) -> str:
    """Return the metric that results are compared by if nobody says: their own first one, or the task's."""
    if result.metrics:
        return result.metrics[0]
    if not hasattr(pipe.task, "compare"):
        raise ConfigError("the task and its results have no metric of their own", where="tune")
    return OWN_METRIC


def _score(pipe: ovforge.Pipeline, metric: str, result: Result, reference: Result) -> float:
    compare = getattr(pipe.task, "compare", None)
    if metric == OWN_METRIC and compare is not None:
        return float(compare(result, reference))
    return float(result.compare(reference, metric))
