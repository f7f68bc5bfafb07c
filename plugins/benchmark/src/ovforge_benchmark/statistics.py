"""Numbers out of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ovforge_benchmark.schema import Histogram, Moment, Statistics

__all__ = ["histogram", "percentile", "summary", "timeline"]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted samples, which is always one of them."""
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def summary(samples: Sequence[float]) -> Statistics:
    """Return the statistics of at least one sample."""
    ordered = sorted(samples)
    return Statistics(
        count=len(ordered),
        min=ordered[0],
        mean=statistics.fmean(ordered),
        stdev=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        median=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def histogram(samples: Sequence[float], bins: int = 40) -> Histogram:
    """Return how often samples fell in each of `bins` parts between the least and the 99th percentile."""
    ordered = sorted(samples)
    low, high = ordered[0], max(percentile(ordered, 99), ordered[0] * 1.0001)
    width = (high - low) / bins or 1e-9
    counts = [0] * (bins + 1)
    for sample in ordered:
        counts[min(int((sample - low) / width), bins)] += 1
    return Histogram(edges=tuple(low + width * n for n in range(bins + 1)), counts=tuple(counts))


def timeline(samples: Sequence[float], times: Sequence[float], slices: int = 60) -> list[Moment]:
    """Return the measured time in slices: how many samples ended in each, and their median."""
    if not times or (end := max(times)) <= 0:
        return []
    width = end / slices
    parts: list[list[float]] = [[] for _ in range(slices)]
    for sample, moment in zip(samples, times, strict=True):
        parts[min(int(moment / width), slices - 1)].append(sample)
    return [
        Moment(start=n * width, count=len(part), median=percentile(sorted(part), 50) if part else None)
        for n, part in enumerate(parts)
    ]
