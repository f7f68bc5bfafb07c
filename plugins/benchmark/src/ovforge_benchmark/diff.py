"""Two reports of the same thing, an older and a newer one: what became slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ovforge.errors import InputError
from ovforge.store import parse_json
from ovforge_benchmark.schema import VERSION, Benchmark, Comparison, Machine

__all__ = ["Change", "changes", "read_report"]

Report = Benchmark | Comparison


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in both reports; `factor` above 1 is for the worse."""

    name: str
    unit: str
    old: float
    new: float
    factor: float


def read_report(path: Path) -> Report:
    """Read a JSON report of `ovforge benchmark` or `ovforge compare`. Raises InputError if it is none."""
    try:
        value: Any = parse_json(path.read_bytes(), str(path), error=InputError)
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    kind = value.get("kind") if isinstance(value, dict) else None
    kinds: dict[Any, type[Report]] = {"benchmark": Benchmark, "comparison": Comparison}
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError("no report of ovforge benchmark or compare", where=str(path), hint="Write one with -o.")
    if value.get("schema_version") != VERSION:
        raise InputError(
            f"its schema is version {value.get('schema_version')!r}, and this program reads {VERSION}", where=str(path),
            hint="Measure again with this version.",
        )  # fmt: skip
    try:
        return kinds[kind].model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=str(path)) from error


def changes(old: Report, new: Report) -> tuple[list[Change], list[str]]:
    """Return every figure that both have, the worst first, and what makes the two hard to compare."""
    if old.kind != new.kind:
        raise InputError(f"a {old.kind} and a {new.kind} have nothing to compare", hint="Give two of one kind.")
    before, after = dict(_figures(old)), dict(_figures(new))
    found = []
    for name, (unit, value) in after.items():
        if name in before and before[name][1] > 0 and value > 0:
            was = before[name][1]
            found.append(Change(name, unit, was, value, was / value if unit == "a second" else value / was))
    if not found:
        raise InputError("they have no figure in common", hint="Give reports of the same model or pipeline.")
    return sorted(found, key=lambda change: -change.factor), _differences(old, new)


def _figures(report: Report) -> Iterator[tuple[str, tuple[str, float]]]:
    if isinstance(report, Comparison):
        for one in report.candidates:
            for name, statistics in one.statistics.items():
                if name not in ("load", "compile", "first call"):
                    yield f"{one.label}: {name}", ("s", statistics.median)
            if one.peak_memory:
                yield f"{one.label}: peak memory", ("bytes", float(sorted(one.peak_memory)[len(one.peak_memory) // 2]))
        return
    if report.latency:
        yield "latency", ("s", report.latency.median)
    if report.throughput:
        yield "throughput", ("a second", report.throughput)
    for name, statistics in report.stages.items():
        yield name, ("s", statistics.median)
    if report.peak_memory:
        yield "peak memory", ("bytes", float(report.peak_memory))


def _differences(old: Report, new: Report) -> list[str]:
    found = []
    for name in Machine.model_fields:
        before, after = getattr(old.machine, name), getattr(new.machine, name)
        if before != after and name in ("cpu", "cores", "versions"):
            found.append(f"measured with another {name}: {before}, then {after}")
    if isinstance(old, Benchmark) and isinstance(new, Benchmark):
        if old.what != new.what:
            found.append(f"of another model: {old.what}, then {new.what}")
        if old.precision != new.precision:
            found.append(f"computed in another precision: {old.precision}, then {new.precision}")
    if not (old.complete and new.complete):
        found.append("one of them was interrupted")
    return found
