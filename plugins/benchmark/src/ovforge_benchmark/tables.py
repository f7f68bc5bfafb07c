"""Reports in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ovforge.cli import plain
from ovforge.model import METRICS, OWN_METRIC
from ovforge_benchmark.diff import Change
from ovforge_benchmark.schema import Candidate, Comparison, Machine, Versus

__all__ = [
    "changes_markdown",
    "comparison_markdown",
    "duration",
    "likeness_title",
    "machine_line",
    "markdown_table",
    "size",
    "versus_markdown",
]

_FIRST = ("load", "compile", "first call")


def duration(seconds: float) -> str:
    """Return a duration with three digits, in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError


def size(count: float) -> str:
    """Return bytes in MB, or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text, the others to the right."""
    cells = [[plain(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])) + "\n"


def machine_line(machine: Machine) -> str:
    """Return the machine in one line."""
    known = set(machine.instruction_sets)
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile") if name in known]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    memory = f", {size(machine.memory)}" if machine.memory else ""
    return (
        f"{machine.cpu}, {machine.cores} processors ({', '.join(sets) or 'no vector units known'}){memory}; {versions}"
    )


def comparison_markdown(report: Comparison, picture: str | None) -> str:
    """Return the whole report; `picture` is the name of the grid beside it."""
    shown = report.candidates
    lines = ["# Comparison\n"]
    if not report.complete:
        lines.append("**Interrupted**: this is what was measured by then.\n")
    if picture:
        lines.append(f"![{', '.join(one.label for one in shown)}]({picture})\n")
    lines.append(markdown_table(["", *(one.label for one in shown)], _rows(shown)))
    lines.append(
        f"Medians of {report.rounds} processes with {report.runs} runs of each call, warm-up apart, the candidates "
        "taking turns; in brackets how many times faster than the first. Likeness is to the first one's results.\n"
    )
    if outputs := list(_outputs(report)):
        lines.append(markdown_table(["", *(one.label for one in shown)], outputs))
    lines.append(f"{machine_line(report.machine)}.\n")
    warnings = [*report.warnings, *(f"{one.label}: {text}" for one in shown for text in one.warnings)]
    lines += [f"- warning: {warning}" for warning in warnings]
    return "\n".join(lines) + ("\n" if warnings else "")


def _rows(shown: Sequence[Candidate]) -> Iterable[list[str]]:
    names = list(dict.fromkeys(name for one in shown for name in one.statistics))
    # A part stands below what it is a part of, though it ends first.
    order = sorted((name for name in names if name not in (*_FIRST, "total")), key=lambda n: (_rank(n, names), n))
    for name in ("total", *order, *_FIRST):
        if name in names:
            title = f"↳ {name.rpartition('.')[2]}" if "." in name else name
            yield [title.replace("_", " "), *(_latency(one, name, shown) for one in shown)]
        if name == "total" and name in names:
            totals = (one.statistics.get(name) for one in shown)
            yield ["↳ the fastest", *("" if total is None else duration(total.min) for total in totals)]
    if any(one.sizes for one in shown):
        yield ["models on disk", *(size(sum(one.sizes.values())) if one.sizes else "" for one in shown)]
    if any(one.peak_memory for one in shown):
        peaks = (statistics.median(one.peak_memory) if one.peak_memory else None for one in shown)
        yield ["peak memory", *("" if peak is None else size(peak) for peak in peaks)]
    for name in dict.fromkeys(name for one in shown for name in one.likeness):
        yield [likeness_title(name), *(_alike(name, one.likeness.get(name)) for one in shown)]
    if any(one.precision for one in shown):
        yield ["computed in", *(", ".join(sorted(set(one.precision.values()))) for one in shown)]


def _rank(name: str, names: Sequence[str]) -> int:
    head = name.partition(".")[0]
    return next((place for place, other in enumerate(names) if other.partition(".")[0] == head), len(names))


def _latency(one: Candidate, name: str, shown: Sequence[Candidate]) -> str:
    mine, first = one.statistics.get(name), shown[0].statistics.get(name)
    if mine is None:
        return ""
    ratio = first and mine is not first and mine.median and first.median / mine.median
    return f"{duration(mine.median)}{f' ({ratio:.2f}x)' if ratio and name in ('total', 'denoise') else ''}"


def likeness_title(metric: str) -> str:
    """Return what a row of a metric is called."""
    return "likeness" if metric == OWN_METRIC else metric.upper()


def _alike(metric: str, scores: Sequence[float] | None) -> str:
    """Return the mean; of decibels, which are unbounded, the worst."""
    if not scores:
        return ""
    if metric in METRICS and METRICS[metric].unit:
        return "equal" if min(scores) >= METRICS[metric].perfect else f"{min(scores):.1f} {METRICS[metric].unit}"
    return f"{statistics.fmean(scores):.4f}"


_SHOWN = 160
"""Letters of a result that a cell shows."""


def _outputs(report: Comparison) -> Iterable[list[str]]:
    """Yield what each call gave, a row a call; pictures have no lines, and stand in the grid."""
    for number in range(max(len(one.outputs) for one in report.candidates)):
        texts = ["; ".join(one.outputs[number]) if number < len(one.outputs) else "" for one in report.candidates]
        if any(texts):
            yield [f"call {number + 1}", *(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..." for text in texts)]


def versus_markdown(report: Versus) -> str:
    """Return the ratio of two, with its interval, in words and as a table."""
    first, second = report.labels
    if report.seconds is None or report.high is None:
        sentence = "Too little was measured to tell which one is faster."
    elif report.low > 1:
        sentence = f"{second} is {report.ratio:.3f} times as fast as {first}."
    elif report.high < 1:
        sentence = f"{first} is {1 / report.ratio:.3f} times as fast as {second}."
    else:
        sentence = "No difference can be told from chance."
    lines = [f"# {first} against {second}\n", f"{sentence}\n"]
    if report.seconds is not None:
        rows = [
            [
                label,
                *(duration(value) for value in (one.min, one.mean, one.median, one.max)),
                ", ".join(sorted(set(p.values()))),
            ]
            for label, one, p in zip(report.labels, report.seconds, report.precision, strict=True)
        ]
        lines.append(markdown_table(["", "min", "mean", "median", "max", "computed in"], rows))
        high = "?" if report.high is None else f"{report.high:.4f}"
        lines.append(
            f"Ratio of times {report.ratio:.4f}, 95 % interval {report.low:.4f} to {high}, {report.pairs} pairs.\n"
        )
    lines.append(f"{machine_line(report.machine)}.\n")
    lines += [f"- warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def changes_markdown(found: Sequence[Change], threshold: float) -> str:
    """Return old and new figures, those beyond the threshold marked."""
    rows = []
    for one in found:
        mark = "**worse**" if one.factor > 1 + threshold else "better" if one.factor < 1 / (1 + threshold) else ""
        old, new = (_figure(value, one.unit) for value in (one.old, one.new))
        rows.append([one.name, old, new, f"{one.new / one.old - 1:+.1%}", mark])
    return markdown_table(["", "old", "new", "change", ""], rows)


def _figure(value: float, unit: str) -> str:
    return duration(value) if unit == "s" else size(value) if unit == "bytes" else f"{value:.2f} {unit}"
