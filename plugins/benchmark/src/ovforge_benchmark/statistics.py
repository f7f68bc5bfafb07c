"""Numbers out of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ovforge_benchmark.schema import Statistics

__all__ = ["percentile", "summary"]


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
