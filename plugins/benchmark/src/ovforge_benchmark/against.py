"""Two in turn, until the ratio of their times is known well enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ovforge_benchmark.flags import REPORTS, refuse
from ovforge_benchmark.loop import Limits, run_async, run_sync
from ovforge_benchmark.machine import machine
from ovforge_benchmark.noise import Watch, disturbances
from ovforge_benchmark.schema import Versus
from ovforge_benchmark.settings import precision_of, ran
from ovforge_benchmark.statistics import summary

__all__ = ["interval", "run_against"]

_BLOCK = 0.2
"""Seconds that each runs before it is the other's turn."""

_LEAST_PAIRS = 8
_DEFAULT_SECONDS = 60


@dataclass
class _Side:
    label: str
    run: Callable[[], float]
    """Runs for a block; returns seconds an inference or call."""
    precision: Mapping[str, str]


def interval(logs: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return (ratio, low, high) of paired log ratios: their mean and Student's t interval, as ratios.

    The quantile of t is Cornish and Fisher's expansion about the normal one (Abramowitz and Stegun 26.7.5).
    """
    count, mean = len(logs), statistics.fmean(logs)
    if count < 2:
        return math.exp(mean), 0.0, math.inf
    z, free = statistics.NormalDist().inv_cdf((1 + confidence) / 2), count - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    half = t * statistics.stdev(logs) / math.sqrt(count)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def run_against(
    first: Mapping[str, Any], second: Mapping[str, Any], tell: Callable[[str, dict[str, Any]], None] = lambda *_: None
) -> Versus:
    """Measure two models or pipelines in turns, which begin with the other one each time.

    Ends where the 95 % interval of the ratio is narrower than `within` to either side, or after -t seconds. The ratio
    is of geometric means of blocks; drifts of the machine's speed meet both alike.
    """
    for flags in (first, second):
        refuse(flags, (*REPORTS, "tune"), "not with --against, which measures two in turn")
    warnings = disturbances()
    tell("step", {"step": "prepare"})
    sides = [_side(first), _side(second)]
    for side in sides:
        side.run()  # warm-up
    within, limit = first["within"], first["time"] or _DEFAULT_SECONDS
    times: tuple[list[float], list[float]] = ([], [])
    logs: list[float] = []
    ratio, low, high = 1.0, 0.0, math.inf
    complete, began = True, time.monotonic()
    tell("step", {"step": "measure"})
    with Watch() as watch:
        try:
            while True:
                pair = [0.0, 0.0]
                for place in (0, 1) if len(logs) % 2 == 0 else (1, 0):
                    pair[place] = sides[place].run()
                for place in (0, 1):
                    times[place].append(pair[place])
                logs.append(math.log(pair[0] / pair[1]))
                ratio, low, high = interval(logs)
                tell("pair", {"pairs": len(logs), "ratio": ratio, "low": low, "high": high})
                known = len(logs) >= _LEAST_PAIRS and high / ratio - 1 < within
                if known or time.monotonic() - began > limit:
                    break
        except KeyboardInterrupt:
            complete = False
    narrow = high / ratio - 1 < within
    warnings += watch.warnings()
    if complete and not narrow:
        warnings.append(f"the interval is still wider than asked after {limit} s: a longer -t, or a quieter machine")
    return Versus(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=complete,
        machine=machine(),
        labels=(sides[0].label, sides[1].label),
        precision=(dict(sides[0].precision), dict(sides[1].precision)),
        seconds=(summary(times[0]), summary(times[1])) if logs else None,
        pairs=len(logs),
        ratio=ratio,
        low=low,
        high=None if math.isinf(high) else high,
        within=within,
        narrow=narrow,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _side(flags: Mapping[str, Any]) -> _Side:
    from ovforge_benchmark.whole import is_pipeline

    return _pipeline_side(flags) if is_pipeline(flags["model"]) else _model_side(flags)


def _pipeline_side(flags: Mapping[str, Any]) -> _Side:
    from ovforge_benchmark.whole import load

    pipe, inputs = load(flags)
    fixed = {**inputs, **({"seed": 0} if "seed" in pipe.inputs_model.model_fields else {})}
    if "seed" in inputs or "seed" in pipe.config.input:
        fixed = inputs

    def run() -> float:
        start, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < _BLOCK or not calls:
            pipe(**fixed)
            calls += 1
        return (time.perf_counter() - start) / calls if elapsed else 0.0

    pipe(**fixed)
    return _Side(flags["label"], run, pipe.provenance()["precision"])


def _model_side(flags: Mapping[str, Any]) -> _Side:
    import openvino as ov

    from ovforge_benchmark.prepare import prepare

    prepared = prepare({**flags, "number_iterations": None})
    limits, quiet = Limits(1, _BLOCK), lambda *_: None
    feeds = prepared.feeds
    closed = len({tuple(tuple(tensor.shape) for tensor in feed.values()) for feed in feeds}) == 1
    inputs = None if closed and flags["inference_only"] is not False else feeds
    if prepared.api == "sync":
        request = prepared.compiled.create_infer_request()
        request.set_tensors(feeds[0])

        def run() -> float:
            measured = run_sync(request, inputs, limits, quiet)
            return _each(measured)
    else:
        queue = ov.AsyncInferQueue(prepared.compiled, flags["number_infer_requests"] or 0)
        for number in range(len(queue)):
            queue[number].set_tensors(feeds[number % len(feeds)])

        def run() -> float:
            return _each(run_async(queue, inputs, limits, quiet))

    precision = precision_of(ran(prepared.compiled))
    return _Side(flags["label"], run, precision)


def _each(measured: Any) -> float:
    if not measured.complete:
        raise KeyboardInterrupt
    return float(measured.duration / len(measured.latencies))
