"""A benchmark as Markdown, CSV and the files that -report_type asks for; all written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovforge.store import atomic_write, csv_table
from ovforge_benchmark.operators import Counter, average_counters, by_type
from ovforge_benchmark.schema import Benchmark, Operator, Statistics
from ovforge_benchmark.tables import duration, machine_line, markdown_table, size

__all__ = ["benchmark_markdown", "csv_text", "operator_table", "write_counters", "write_report"]

_MOST_LAYERS = 20


def write_report(output: Path, report: Benchmark) -> list[Path]:
    """Write REPORT.json, .csv, .md and .html; return them."""
    from ovforge_benchmark.html import benchmark_html

    files = {
        ".json": report.model_dump_json(indent=2) + "\n",
        ".csv": csv_text(report),
        ".md": benchmark_markdown(report),
        ".html": benchmark_html(report),
    }
    base = output.with_suffix("") if output.suffix in files else output
    written = []
    for suffix, text in files.items():
        path = base.with_name(base.name + suffix)
        atomic_write(path, text.encode())
        written.append(path)
    return written


def benchmark_markdown(report: Benchmark, layers: str = "sort") -> str:
    """Return the whole report. `layers` is -pcsort's order."""
    lines = [f"# {report.what}\n"]
    if not report.complete:
        lines.append("**Interrupted**: this is what was measured by then.\n")
    rows = [[name, *_cells(one)] for name, one in _all(report)]
    if rows:
        head = ["", "runs", "min", "mean", "median", "p90", "p99", "max"]
        if report.shares:
            head.insert(1, "share")
            for row in rows:
                row.insert(1, f"{report.shares[row[0]]:.1%}" if row[0] in report.shares else "")
        shown = [[_title(row[0]), *row[1:]] for row in rows]
        lines.append(markdown_table(head, shown))
    facts = [["throughput", f"{report.throughput:.2f} a second"]] if report.throughput else []
    facts += [[f"percentile {name}", duration(value)] for name, value in report.percentile.items() if name != "50"]
    facts += [[name.replace("_", " "), duration(value)] for name, value in report.start.items()]
    facts += [["peak memory", size(report.peak_memory)]] if report.peak_memory else []
    facts += [["energy", f"{report.energy:.1f} J, {report.energy / report.iterations:.3f} J each"]] if (
        report.energy is not None and report.iterations
    ) else []  # fmt: skip
    computed = ", ".join(sorted(set(report.precision.values())))
    facts += [["computed in", computed]] if computed else []
    facts += [[name, str(report.ran[key])] for name, key in _RAN if key in report.ran]
    lines.append(markdown_table(["", ""], facts))
    if report.inputs:
        inputs = [[one.name, one.type, one.shape, one.layout, one.filled_with] for one in report.inputs]
        lines.append(markdown_table(["input", "type", "shape", "layout", "filled with"], inputs))
    if report.operators:
        lines.append("Time by type of layer, then by layer:\n")
        lines.append(operator_table(report.operators, layers))
    lines.append(f"{machine_line(report.machine)}.\n")
    lines += [f"- warning: {warning}" for warning in report.warnings]
    return "\n".join(lines) + ("\n" if report.warnings else "")


_RAN = (
    ("device", "FULL_DEVICE_NAME"), ("api", "api"), ("hint", "PERFORMANCE_HINT"), ("requests", "requests"),
    ("streams", "NUM_STREAMS"), ("threads", "INFERENCE_NUM_THREADS"),
)  # fmt: skip


def _all(report: Benchmark) -> Iterable[tuple[str, Statistics]]:
    """Yield every set of statistics: parts of a pipeline below what they are a part of."""
    if report.latency:
        yield ("call" if report.subject == "pipeline" else "latency"), report.latency
    tops = list(dict.fromkeys(name.partition(".")[0] for name in report.stages))
    for name in sorted(report.stages, key=lambda one: (tops.index(one.partition(".")[0]), one)):
        yield name, report.stages[name]
    for group in report.groups:
        if group.latency:
            yield ", ".join(f"{name}{list(shape)}" for name, shape in group.shapes.items()), group.latency


def _title(name: str) -> str:
    return f"↳ {name.rpartition('.')[2]}" if "." in name and "[" not in name else name


def _cells(one: Statistics) -> list[str]:
    values = (one.min, one.mean, one.median, one.p90, one.p99, one.max)
    return [str(one.count), *(duration(value) for value in values)]


def operator_table(found: Sequence[Operator], order: str = "sort") -> str:
    """Return time by type and by layer, with the part of the whole; `order` is -pcsort's."""
    total = sum(one.seconds for one in found) or 1.0
    types = [
        [role, kind, str(count), duration(seconds), f"{seconds / total:.1%}"]
        for role, kind, count, seconds in by_type(found)
    ]
    layers = list(found) if order == "no_sort" else sorted(found, key=lambda one: -one.seconds)
    more = len(layers) - _MOST_LAYERS if order != "no_sort" else 0
    shown = layers[:_MOST_LAYERS] if more > 0 else layers
    rows = [
        [one.role, one.type, one.name, one.kernel, duration(one.seconds), f"{one.seconds / total:.1%}"] for one in shown
    ]
    text = markdown_table(["role", "type", "layers", "time", "share"], types)
    text += "\n" + markdown_table(["role", "type", "layer", "kernel", "time", "share"], rows)
    return text + (f"\nand {more} shorter ones.\n" if more > 0 else "")


def csv_text(report: Benchmark) -> str:
    """Return one row of statistics a line, in seconds."""
    head = list(Statistics.model_fields)
    rows = [[name, *(getattr(one, field) for field in head)] for name, one in _all(report)]
    rows += [[f"start {name}", 1, *[value] * 2, 0.0, *[value] * 5] for name, value in report.start.items()]
    return csv_table([["name", *head], *rows])


def write_counters(flags: Mapping[str, Any], report: Benchmark, each: Sequence[Sequence[Counter]]) -> None:
    """Write what -report_type asks for, into -report_folder: benchmark_report, and layers beside it.

    The files of layers are those of benchmark_app: their names, columns, separators and totals. With -pcsort there is
    benchmark_sorted_report, too.
    """
    folder, kind = Path(flags["report_folder"]), flags["report_type"]

    def write(name: str, value: Any, text: str) -> None:
        data = json.dumps(value, indent=2) + "\n" if flags["json_stats"] else text
        atomic_write(folder / f"{name}.{'json' if flags['json_stats'] else 'csv'}", data.encode())

    facts: dict[str, Any] = {
        "model": report.what, "iterations": report.iterations, "duration (s)": report.duration,
        "throughput (FPS)": report.throughput, **{f"{name} (s)": value for name, value in report.start.items()},
        **({f"latency {name} (s)": getattr(report.latency, name) for name in Statistics.model_fields if name != "count"}
           if report.latency else {}),
        **{f"percentile {name} (s)": value for name, value in report.percentile.items()},
        **{f"ran {name}": value for name, value in report.ran.items()},
    }  # fmt: skip
    write("benchmark_report", report.model_dump(mode="json"), csv_table([["name", "value"], *facts.items()]))
    if kind not in ("average_counters", "detailed_counters") or not each:
        return
    mean = average_counters(each)
    if kind == "average_counters":
        value: dict[str, Any] = {"report_type": "average", "avg_performance": _nodes(mean)}
        write("benchmark_average_counters_report", value, _counters_csv([mean]))
    else:
        value = {"report_type": "detailed", "detailed_performance": [_nodes(one) for one in each]}
        write("benchmark_detailed_counters_report", value, _counters_csv(each))
    if flags["perf_counts_sort"]:
        ordered = _ordered(mean, flags["perf_counts_sort"])
        value = {"report_type": "sorted", "avg_performance": _nodes(ordered, shares=True)}
        write("benchmark_sorted_report", value, _sorted_csv(ordered))


_COLUMNS = ("layerName", "execStatus", "layerType", "execType", "realTime (ms)", "cpuTime (ms)")


def _counters_csv(runs: Sequence[Sequence[Counter]]) -> str:
    text = ""
    for layers in runs:
        rows = [(one.name, one.status, one.type, one.kernel, f"{one.real:.3f}", f"{one.cpu:.3f}") for one in layers]
        real, cpu = _totals(layers)
        total = ("Total", "", "", "", f"{real:.3f}", f"{cpu:.3f}")
        text += csv_table([_COLUMNS, *rows, total], delimiter=";") + "\n"
    return text


def _sorted_csv(layers: Sequence[Counter]) -> str:
    real, cpu = _totals(layers)
    rows: list[Sequence[str]] = [
        (one.name, one.status, one.type, one.kernel, f"{one.real:.3f}", f"{one.cpu:.3f}", _share(one, real))
        for one in layers
    ]
    rows += [(), (f"Total time: {real:.2f} milliseconds",), (f"Total CPU time: {cpu:.2f} milliseconds",)]
    return csv_table([[*_COLUMNS, "proportion (%)"], *rows])


def _ordered(layers: Sequence[Counter], order: str) -> Sequence[Counter]:
    """Return layers in -pcsort's order: no_sort, the longest first, or likewise without those that did not run."""
    if order == "no_sort":
        return layers
    ran = [one for one in layers if order != "simple_sort" or "NOT_RUN" not in one.status]
    return sorted(ran, key=lambda one: -one.real)


def _nodes(layers: Sequence[Counter], *, shares: bool = False) -> dict[str, Any]:
    real, cpu = _totals(layers)
    nodes = [
        {
            "name": one.name, "node_type": one.type, "status": one.status, "real_time": f"{one.real:.3f}",
            "cpu_time": f"{one.cpu:.3f}", "exec_type": one.kernel, **({"%": _share(one, real)} if shares else {}),
        }
        for one in layers
    ]  # fmt: skip
    return {"nodes": nodes, "total_real_time": f"{real:.3f}", "total_cpu_time": f"{cpu:.3f}"}


def _totals(layers: Sequence[Counter]) -> tuple[float, float]:
    return sum(one.real for one in layers), sum(one.cpu for one in layers)


def _share(one: Counter, total: float) -> str:
    return f"{one.real / (total or 1) * 100:.2f}%"
