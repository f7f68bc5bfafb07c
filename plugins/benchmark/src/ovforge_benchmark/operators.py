"""Where the time goes inside a model: the device's counters, by layer and by type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from ovforge_benchmark.schema import Operator

__all__ = ["Counter", "average", "average_counters", "by_type", "counters", "operators"]

_SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Counter:
    """A layer of one inference as the device counts it, one that did not run as well; times in milliseconds."""

    name: str
    status: str
    type: str
    kernel: str
    real: float
    cpu: float


def counters(infos: Sequence[Any]) -> list[Counter]:
    """Return all layers of one inference, in the order of the graph; `infos` is a request's profiling_info."""
    millisecond = timedelta(milliseconds=1)
    return [
        Counter(
            info.node_name, str(info.status), info.node_type, info.exec_type, info.real_time / millisecond,
            info.cpu_time / millisecond,
        )
        for info in infos
    ]  # fmt: skip


def average_counters(runs: Sequence[Sequence[Counter]]) -> list[Counter]:
    """Return each layer once, its times the sums over all inferences by their number."""
    found: dict[str, list[Counter]] = {}
    for run in runs:
        for one in run:
            found.setdefault(one.name, []).append(one)
    return [
        replace(each[0], real=sum(one.real for one in each) / len(runs), cpu=sum(one.cpu for one in each) / len(runs))
        for each in found.values()
    ]


def operators(role: str, infos: Sequence[Any]) -> list[Operator]:
    """Return one inference's layers that ran, in the order of the graph; `infos` is a request's profiling_info."""
    ran = [info for info in infos if "EXECUTED" in str(info.status)]
    total = sum((info.real_time for info in ran), timedelta()) / _SECOND or 1.0
    return [
        Operator(
            role=role,
            name=info.node_name,
            type=info.node_type,
            kernel=info.exec_type,
            seconds=info.real_time / _SECOND,
            cpu_seconds=info.cpu_time / _SECOND,
            share=info.real_time / _SECOND / total,
        )
        for info in ran
    ]


def average(role: str, runs: Iterable[Sequence[Operator]], scale: float = 1.0) -> list[Operator]:
    """Return the mean of several inferences' layers, times `scale`; a layer that ran in some counts as 0 in others."""
    sums: dict[str, list[float]] = {}
    facts: dict[str, Operator] = {}
    count = 0
    for run in runs:
        count += 1
        for one in run:
            facts[one.name] = one
            both = sums.setdefault(one.name, [0.0, 0.0])
            both[0] += one.seconds
            both[1] += one.cpu_seconds
    total = sum(real for real, _ in sums.values()) or 1.0
    return [
        facts[name].model_copy(
            update={
                "role": role,
                "seconds": real / count * scale,
                "cpu_seconds": cpu / count * scale,
                "share": real / total,
            }
        )
        for name, (real, cpu) in sums.items()
    ]


def by_type(found: Iterable[Operator]) -> list[tuple[str, str, int, float]]:
    """Return (role, type, layers, seconds), the longest first."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for one in found:
        count, seconds = sums.get((one.role, one.type), (0, 0.0))
        sums[one.role, one.type] = (count + 1, seconds + one.seconds)
    rows = [(role, kind, count, seconds) for (role, kind), (count, seconds) in sums.items()]
    return sorted(rows, key=lambda row: -row[3])
