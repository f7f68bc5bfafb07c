"""What several changes together will cost, from what each of them brought alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ovforge_benchmark.tuning.changes import Change
from ovforge_benchmark.tuning.schema import Aim, Trial

__all__ = ["Forecast", "forecasts"]

_MOST = 4
"""Changes at a time."""

_WIDEST = 12
"""Changes that are combined: those that gain most alone."""

_LEAST_GAIN = 0.01
"""Part of the cost that a change must save alone to be combined with others."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A set of changes, its cost (seconds or bytes), and the score that is to be expected."""

    changes: tuple[Change, ...]
    cost: float
    score: float


def forecasts(
    original: Trial, alone: Mapping[Change, Trial], aim: Aim, min_score: float, perfect: float
) -> list[Forecast]:
    """Return sets of two changes or more that should be better than each of their parts, the cheapest first.

    A part of a call takes the product of what the changes leave of it; bytes that are saved add up, as do losses of
    score. Losses are taken at three quarters, since changes of one picture seldom add up in full: too much is tried
    rather than too little.
    """
    base = original.cost(aim)
    useful = [change for change, trial in alone.items() if trial.cost(aim) < base * (1 - _LEAST_GAIN)]
    useful = sorted(useful, key=lambda change: alone[change].cost(aim))[:_WIDEST]
    found = []
    for count in range(2, _MOST + 1):
        for changes in itertools.combinations(useful, count):
            if not _fit(changes, alone):
                continue
            trials = [alone[change] for change in changes]
            score = perfect - 0.75 * sum(max(perfect - trial.score, 0) for trial in trials)
            cost = _cost(original, trials, aim)
            if score >= min_score and cost < min(trial.cost(aim) for trial in trials):
                found.append(Forecast(changes, cost, score))
    return sorted(found, key=lambda forecast: forecast.cost)


def _fit(changes: Sequence[Change], alone: Mapping[Change, Trial]) -> bool:
    """Say whether changes go together: one of each extension, and one quantizer for each model."""
    if len({change.slot for change in changes}) < len(changes):
        return False
    roles = [role for change in changes if change.kind == "quantizer" for role in alone[change].roles]
    return len(set(roles)) == len(roles)


def _cost(original: Trial, trials: Sequence[Trial], aim: Aim) -> float:
    if aim == "memory":
        base = original.cost(aim)
        return base - sum(base - trial.cost(aim) for trial in trials)
    if aim == "throughput":  # calls side by side have no parts of their own time
        cost = original.seconds
        for trial in trials:
            cost *= trial.seconds / original.seconds
        return cost
    parts = {**original.stages, "": max(original.seconds - sum(original.stages.values()), 0.0)}
    for trial in trials:
        rest = max(trial.seconds - sum(trial.stages.values()), 0.0)
        for name in parts:
            before = original.stages.get(name, 0.0)
            if name and before > 0 and name in trial.stages:
                parts[name] *= trial.stages[name] / before
            elif not name:
                parts[name] = min(parts[name], rest)
    return sum(parts.values())
