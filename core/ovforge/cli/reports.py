"""What a pipeline gave and did, for people and for programs; and whether its result can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.cli.output import print_line, print_table, print_warning
from ovforge.errors import InputError

if TYPE_CHECKING:
    from ovforge.contracts.quantization import Outcome
    from ovforge.contracts.stages import Report
    from ovforge.model.results import Result, Timings
    from ovforge.run.pipeline import Pipeline
    from ovforge.run.resolution import Step

__all__ = ["check_folder", "check_writable", "print_reports", "print_result", "reports_as_json", "result_as_json"]

_NAMED = 64
"""Files of one folder that are named one by one."""


def check_writable(path: Path, result: type[Result] | None = None) -> None:
    """Raise InputError if `path` cannot be written, or is of a kind that the result is not saved as.

    For before the work starts. Nothing of it is left behind.
    """
    if result is not None:
        result.check_path(path)
    folder = path.parent
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), hint="Make it, or name another --output.")
    if path.is_dir() and path.suffix:
        raise InputError("is a folder, and a file is to be written", where=str(path), hint="Name another --output.")
    if result is not None and not path.suffix:
        result.check_folder(path)
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raise InputError if nothing can be written in a folder, or made of it if it is not there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"nothing can be written there: {error.strerror}", where=str(folder.absolute()),
            hint="Change its permissions, or name another --output.",
        ) from error  # fmt: skip


def print_result(
    result: Result, files: Sequence[Path], pipeline: Pipeline, *, quiet: bool = False, replaced: Sequence[Path] = ()
) -> None:
    """Print timings, what quantizers did, the precision that ran, the result itself and its files.

    Warnings go to standard error, with `quiet` as well.
    """
    for warning in result.warnings:
        print_warning(warning)
    if quiet:
        return
    start = pipeline.start_timings()
    cached = [f"compile.{role}" for role, model in pipeline.compiled.all() if model.cached]
    _print_timings("getting ready", start, cached)
    _print_timings("run", result.timings)
    rest = result.timings.whole() - sum(row.seconds for row in result.timings.rows() if row.depth == 0)
    if rest > 0.01 * result.timings.whole():
        _print_time(1, "waiting and other", rest)
    _print_time(0, "total", pipeline.elapsed)
    if start.whole() + result.timings.whole() > 1.005 * pipeline.elapsed:
        print_line("Models go on compiling while the run begins: the parts are more than the total.")
    print_reports(pipeline.resolved.steps, pipeline.reports, pipeline.outcome, warnings=False)
    precision = ", ".join(sorted(set(result.provenance.get("precision", {}).values())))
    device = result.provenance.get("device", {})
    print_line(f"{device.get('full_name', '')} ({device.get('name', '')}), computed in {precision}")
    for line in result.lines():
        print_line(line)
    for folder, group in groupby(files, key=lambda file: file.parent):
        several = list(group)
        if len(several) > _NAMED:
            named = [(folder, f": {len(several)} files, {several[0].name} to {several[-1].name}", several[0])]
        else:
            named = [(file, "", file) for file in several]
        for path, note, file in named:
            print_line((str(path), "bold"), f"{note}{' (replaced)' if file in replaced else ''}")


def _print_timings(title: str, timings: Timings, cached: Sequence[str] = ()) -> None:
    """Print a whole, then its parts below it, those that run at the same time marked."""
    _print_time(0, title, timings.whole())
    for row in timings.rows():
        notes = [f"{row.count} x {row.seconds / row.count:.3f} s"] if row.count > 1 else []
        notes += ["from the cache"] if row.name in cached else []
        notes += ["side by side"] if row.side_by_side else []
        depth = row.depth + 1
        _print_time(depth, row.name.rpartition(".")[2] if row.depth else row.name, row.seconds, notes)


def _print_time(depth: int, name: str, seconds: float, notes: Sequence[str] = ()) -> None:
    more = f"  ({', '.join(notes)})" if notes else ""
    print_line(f"{'  ' * depth}{name.replace('_', ' '):<{26 - 2 * depth}}{seconds:9.3f} s{more}")


def result_as_json(
    result: Result, files: Sequence[Path], pipeline: Pipeline, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the same for programs: times in seconds; `warnings` are those that did not come with the result."""
    return {
        "files": [str(file) for file in files],
        "result": result.as_json(),
        "start": pipeline.start_timings().spans,
        "timings": result.timings.spans,
        "seconds": {"run": result.timings.whole(), "total": pipeline.elapsed},
        "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
        "provenance": result.provenance,
        **reports_as_json(pipeline.resolved.steps, pipeline.reports, pipeline.outcome),
    }


def print_reports(
    steps: Sequence[Step], reports: Sequence[Report], outcome: Outcome | None, *, warnings: bool = True
) -> None:
    """Print a table of each quantizer's roles, what was left alone and why, and what the gate said.

    Without `warnings`, notes and what was left alone are printed elsewhere.
    """
    for step, report in _quantized(steps, reports):
        name = step.chosen.name
        if report.roles:
            titles = [name, "layers", "before", "after", ""]
            print_table(titles, _sizes(report), right=titles[1:])
        else:
            print_line((name, "bold"), ": nothing was changed")
        for line in (*report.applied, *(report.notes if warnings else ())):
            print_line(f"  {line}")
        for skip in report.skipped if warnings else ():
            print_line("  ", ("ignored", "yellow"), f" {skip.item}: {skip.reason}")
        if report.seconds is not None:
            print_line(f"  took {report.seconds:.1f} s")
    if outcome is not None:
        print_line("quality: ", (str(outcome), "green" if outcome.passed else "red"))
        for role, names in outcome.kept.items():
            print_line(f"  kept in {role}: {', '.join(names)}")


def _sizes(report: Report) -> Iterator[list[str]]:
    for role in report.roles:
        before, after = report.sizes.get(role, (0, 0))
        layers = str(len(report.layers[role])) if role in report.layers else "?"
        part = f"{after / before:.0%}" if before else ""
        yield [role, layers, f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", part]


def reports_as_json(steps: Sequence[Step], reports: Sequence[Report], outcome: Outcome | None) -> dict[str, Any]:
    """Return the same for programs."""
    return {
        "quantize": [{"use": step.chosen.name, **asdict(report)} for step, report in _quantized(steps, reports)],
        "quality": outcome.as_json() if outcome else None,
    }


def _quantized(steps: Sequence[Step], reports: Sequence[Report]) -> list[tuple[Step, Report]]:
    pairs = zip(steps, reports, strict=True)
    return [(step, report) for step, report in pairs if step.is_quantizer]
