"""ovforge benchmark, bench-diff."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["bench_diff", "benchmark"]

SLOWER = 3
"""Exit code of bench-diff where something became slower than the threshold allows."""

benchmark = typer.Typer(add_completion=False, rich_markup_mode=None)


# The flags are benchmark_app's, with one dash and many letters: argparse reads them as that program does.
@benchmark.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    help="Measure a model or a whole pipeline, with benchmark_app's flags and more.",
)
def _benchmark(context: typer.Context) -> None:
    from ovforge.cli import print_json
    from ovforge_benchmark.flags import parser

    reader = parser()
    arguments = reader.check(context.args)
    flags = vars(arguments)
    if flags["schema"]:
        from ovforge_benchmark.schema import report_schema

        print_json(report_schema())
        return
    _name_model(flags)
    with _teller(flags) as tell:
        _measure(reader, arguments, tell)


def _measure(reader: Any, arguments: Any, tell: Any) -> None:
    flags = vars(arguments)
    if flags["against"]:
        words = shlex.split(flags["against"])
        start = copy.deepcopy(arguments)
        start.model = start.path_to_model = start.against = None
        second = vars(reader.check(words, start))
        _name_model(second)
        flags["label"] = flags["model"] if flags["model"] != second["model"] else f"A, {flags['model']}"
        second["label"] = (
            flags["against"] if flags["model"] != second["model"] else f"B, {' '.join(words[1:]) or 'same'}"
        )
        _print_versus(flags, second, tell)
        return
    _check_output(flags)
    if flags["tune"]:
        from ovforge_benchmark.tune import tune

        found = tune(flags, tell)
        _write(flags, found.model_dump_json(indent=2), found.markdown())
        _say(flags, found.model_dump_json(indent=2), found.markdown())
        if not found.complete:
            raise KeyboardInterrupt
        return
    _print_report(flags, tell)


def _name_model(flags: dict[str, Any]) -> None:
    if flags["model"] and flags["path_to_model"]:
        raise typer.BadParameter(f"two models: {flags['model']} and -m {flags['path_to_model']}")
    flags["model"] = flags["model"] or flags["path_to_model"]
    if not flags["model"]:
        raise typer.BadParameter("Name a model or a pipeline: ovforge benchmark model.xml")
    _check_trust(flags)


def _check_trust(flags: Mapping[str, Any]) -> None:
    from ovforge.cli import check_trust
    from ovforge_benchmark.whole import is_pipeline

    if is_pipeline(flags["model"]):
        inputs = [f"input.{text}" for texts in flags["paths_to_input"] for text in texts if "=" in text]
        check_trust(Path(flags["model"]), [*flags["set"], *inputs], flags["trust"])


def _check_output(flags: Mapping[str, Any]) -> None:
    """Refuse folders that are not there or cannot be written, before anything is measured."""
    from ovforge.cli import check_writable

    for name in ("output", "dump_config", "exec_graph_path"):
        if flags[name]:
            check_writable(Path(flags[name]))
    if flags["report_type"]:
        check_writable(Path(flags["report_folder"]) / "benchmark_report.csv")


def _print_report(flags: Mapping[str, Any], tell: Any) -> None:
    from ovforge_benchmark.reports import benchmark_markdown, write_report
    from ovforge_benchmark.whole import is_pipeline, run_pipeline

    if is_pipeline(flags["model"]):
        report = run_pipeline(flags, tell)
    else:
        from ovforge_benchmark.model import run_model

        report = run_model(flags, tell)
    if flags["output"]:
        write_report(Path(flags["output"]), report)
    shown = report if flags["perf_counts"] or flags["perf_counts_sort"] else report.model_copy(update={"operators": ()})
    _say(flags, report.model_dump_json(indent=2), benchmark_markdown(shown, flags["perf_counts_sort"] or "sort"))
    if not report.complete:
        raise KeyboardInterrupt


def _print_versus(flags: Mapping[str, Any], second: Mapping[str, Any], tell: Any) -> None:
    from ovforge_benchmark.against import run_against
    from ovforge_benchmark.tables import versus_markdown

    _check_output(flags)
    report = run_against(flags, second, tell)
    text = versus_markdown(report)
    _write(flags, report.model_dump_json(indent=2), text)
    _say(flags, report.model_dump_json(indent=2), text)
    if not report.complete:
        raise KeyboardInterrupt


def _write(flags: Mapping[str, Any], as_json: str, text: str) -> None:
    """Write REPORT.json and REPORT.md, if a report is asked for."""
    from ovforge.store import atomic_write

    if flags["output"]:
        base = Path(flags["output"])
        atomic_write(base.with_suffix(".json"), f"{as_json}\n".encode())
        atomic_write(base.with_suffix(".md"), text.encode())


def _say(flags: Mapping[str, Any], as_json: str, text: str) -> None:
    from ovforge.cli import print_block, print_json

    if flags["json_lines"]:
        print_json({"event": "report", "report": json.loads(as_json)}, indent=None)
    elif flags["json"]:
        print_json(json.loads(as_json))
    elif not flags["quiet"]:
        print_block(text)


@contextmanager
def _teller(flags: Mapping[str, Any]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Yield what tells of progress: JSON lines on standard output, or one changing line that a person looks at."""
    from ovforge.cli import print_json, status_line

    if flags["json_lines"]:
        yield lambda event, facts: print_json({"event": event, **facts}, indent=None)
        return
    if flags["quiet"] or flags["json"]:
        yield lambda event, facts: None
        return
    with status_line() as show:
        yield lambda event, facts: show(
            ", ".join(
                f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
            )
        )


def bench_diff(
    old: Annotated[Path, typer.Argument(help="A JSON report of ovforge benchmark or compare.")],
    new: Annotated[Path, typer.Argument(help="A newer one of the same.")],
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, help="How much worse a figure may be: 0.05 is 5 %.")
    ] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Compare two reports. Exit codes: 0 nothing is worse than the threshold allows, 3 something is.

    Example: ovforge bench-diff before.json after.json
    """
    from dataclasses import asdict

    from ovforge.cli import print_block, print_json, print_warning
    from ovforge_benchmark.diff import changes, read_report
    from ovforge_benchmark.tables import changes_markdown

    found, warnings = changes(read_report(old), read_report(new))
    worse = [change for change in found if change.factor > 1 + threshold]
    if as_json:
        print_json({"changes": [asdict(one) for one in found], "worse": [one.name for one in worse],
                    "warnings": warnings, "threshold": threshold})  # fmt: skip
    else:
        print_block(changes_markdown(found, threshold))
        for warning in warnings:
            print_warning(warning)
    raise typer.Exit(SLOWER if worse else 0)
