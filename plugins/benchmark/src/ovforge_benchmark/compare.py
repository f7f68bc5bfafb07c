"""`ovforge compare`: candidates take turns, each turn in a process of its own."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

import ovforge
from ovforge.contracts import Progress, ignore_progress
from ovforge.errors import InputError
from ovforge.model import ImagesResult, Result, open_picture
from ovforge.store import scratch_folder
from ovforge_benchmark.candidates import Asked
from ovforge_benchmark.machine import machine
from ovforge_benchmark.noise import disturbances
from ovforge_benchmark.process import in_process, take_over
from ovforge_benchmark.schema import Candidate, Comparison
from ovforge_benchmark.statistics import summary

__all__ = ["compare"]

_DEFAULT_SEED = 0


@dataclass
class _Measured:
    """What is known of a candidate so far."""

    asked: Asked
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    noise: list[str] = field(default_factory=list)


def compare(
    asked: Sequence[Asked],
    calls: Sequence[Mapping[str, Any]] = ({},),
    *,
    rounds: int = 3,
    runs: int = 3,
    cache: bool = True,
    progress: Callable[[Progress], None] = ignore_progress,
) -> tuple[Comparison, list[list[Image.Image]]]:
    """Return the report, and for each candidate a picture of each call's result (none if its results show none).

    First every candidate runs once, unmeasured: caches are filled, results kept, models weighed. Then, `rounds` times,
    each in turn has a new process that loads, makes every call once to warm up, and `runs` times to be measured.
    An interruption ends the measurement, and the report says that it is not complete.
    """
    for each in asked:
        if each.kind == "pipeline":  # a mistake in the last one is known before the first one is converted
            config = Path(each.config) if isinstance(each.config, str) else each.config
            ovforge.plan(config, overrides=each.overrides, cache="default" if cache else None)
    warnings = disturbances()
    measured = [_Measured(one) for one in asked]
    complete = True
    total = len(asked) * (rounds + 1)
    try:
        _prepare(measured, [dict(call) for call in calls], cache, lambda n, who: progress(_turn(n, total, who)))
        for number in range(rounds):
            for position, one in enumerate(measured):
                progress(_turn((number + 1) * len(asked) + position, total, one.asked.label))
                if one.asked.kind != "picture":
                    _measure(one, runs, cache)
    except KeyboardInterrupt:
        complete = False
    report = Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=complete,
        machine=machine(_packages(measured)),
        rounds=rounds,
        runs=runs,
        calls=[dict(call) for call in calls],
        candidates=tuple(_candidate(one, measured[0]) for one in measured),
        warnings=tuple(warnings),
    )
    return report, [_previews(one.results) for one in measured]


def _turn(done: int, total: int, who: str) -> Progress:
    return Progress("compare", done, total, who)


def _prepare(
    measured: Sequence[_Measured], calls: list[dict[str, Any]], cache: bool, say: Callable[[int, str], None]
) -> None:
    """Run each once. Pipelines first: diffusers is given the inputs that the first of them ran with.

    A seed that nobody gave is drawn here, once: drawn in a process, each call of the first pipeline had its own.
    """
    inputs: list[dict[str, Any]] | None = None
    drawn = secrets.randbelow(2**32)
    order = sorted(measured, key=lambda one: one.asked.kind != "pipeline")
    for number, one in enumerate(order):
        say(number, one.asked.label)
        if one.asked.kind == "picture":
            one.results = [ImagesResult(images=[open_picture(Path(one.asked.what), "compare")])] * len(calls)
            continue
        if one.asked.kind == "diffusers":
            first_inputs = inputs or [{"seed": _DEFAULT_SEED}] * len(calls)
            one.calls = [{**first, **call} for first, call in zip(first_inputs, calls, strict=True)]
        else:
            one.calls = calls
        seed = inputs[0].get("seed") if inputs else drawn
        with scratch_folder() as folder:
            handed = folder / "results"
            job = _job(one, cache, warmup=0, runs=1, seed=seed, results=str(handed), sizes=True)
            one.facts = in_process(job, one.asked.label)
            one.results = take_over(handed)
        if one.asked.kind == "pipeline":
            one.calls = [
                {**call, **({"seed": ran["seed"]} if "seed" in ran else {})}
                for call, ran in zip(calls, one.facts["inputs"], strict=True)
            ]
            inputs = inputs or one.facts["inputs"]


def _measure(one: _Measured, runs: int, cache: bool) -> None:
    answer = in_process(_job(one, cache, warmup=1, runs=runs), one.asked.label)
    for name, samples in answer["stages"].items():
        one.stages.setdefault(name, []).extend(samples)
    one.noise = max(one.noise, answer["noise"], key=len)
    if answer["peak_memory"] is not None:
        one.peaks.append(answer["peak_memory"])


def _job(
    one: _Measured,
    cache: bool,
    *,
    warmup: int,
    runs: int,
    seed: int | None = None,
    results: str | None = None,
    sizes: bool = False,
) -> dict[str, Any]:
    asked = one.asked
    return {
        "kind": asked.kind, "config": asked.config, "overrides": asked.overrides, "dtype": asked.dtype,
        "calls": one.calls, "warmup": warmup, "runs": runs, "seed": seed, "results": results, "sizes": sizes,
        "cache": cache,
    }  # fmt: skip


def _unsteady(one: _Measured) -> list[str]:
    """Say where runs differ much: their median is then not worth much."""
    totals = one.stages.get("total", [])
    if len(totals) < 3:
        return []
    middle = statistics.median(totals)
    deviation = statistics.median(abs(total - middle) for total in totals) / middle
    return [f"runs differ by {deviation:.0%} (median deviation): add --rounds"] if deviation > 0.1 else []


def _packages(measured: Sequence[_Measured]) -> list[str]:
    return ["torch", "diffusers", "transformers"] if any(one.asked.kind == "diffusers" for one in measured) else []


def _previews(results: Sequence[Result]) -> list[Image.Image]:
    """Return each result's picture; none if one of them has none."""
    pictures = [picture for result in results if (picture := result.preview()) is not None]
    return pictures if len(pictures) == len(results) else []


def _likeness(one: _Measured, first: _Measured) -> dict[str, list[float]]:
    """Return how close a candidate's results come to the first one's, by every metric that all of them have."""
    pairs = list(zip(one.results, first.results, strict=False))
    if one is first or not pairs or any(type(ours) is not type(theirs) for ours, theirs in pairs):
        return {}
    shared = [name for name in pairs[0][0].metrics if all(name in result.metrics for pair in pairs for result in pair)]
    try:
        return {name: [ours.compare(theirs, name) for ours, theirs in pairs] for name in shared}
    except InputError as error:
        raise InputError(error.what, where=one.asked.label, hint=error.hint) from error


def _candidate(one: _Measured, first: _Measured) -> Candidate:
    facts = one.facts
    return Candidate(
        label=one.asked.label,
        what=one.asked.what,
        kind=one.asked.kind,
        precision=facts.get("precision", {}),
        sizes=facts.get("sizes", {}),
        peak_memory=one.peaks,
        stages=one.stages,
        statistics={name: summary(samples) for name, samples in one.stages.items()},
        likeness=_likeness(one, first),
        outputs=[result.lines() for result in one.results],
        provenance=facts.get("provenance", {}),
        warnings=tuple(dict.fromkeys([*facts.get("warnings", ()), *one.noise, *_unsteady(one)])),
    )
