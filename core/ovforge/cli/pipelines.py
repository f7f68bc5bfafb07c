"""run, plan, convert, schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovforge.cli.trust import Force, Trust, check_output, check_trust
from ovforge.errors import InputError

if TYPE_CHECKING:
    from ovforge.contracts.stages import Progress
    from ovforge.model.results import Result
    from ovforge.run.pipeline import Pipeline
    from ovforge.store.cache import Cache

__all__ = ["NoCache", "convert", "plan", "print_result", "progress_bar", "run", "schema"]

Config = Annotated[Path, typer.Argument(help="A .toml or .json config, or a PNG that ovforge made.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key: scheduler.use=lcm")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep nothing on disk, and use nothing that is there.")]


def run(
    config: Config,
    set_: Set = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="NAME=VALUE", help="Set an input: prompt='a cat'")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the result.")] = None,
    force: Force = False,
    trust: Trust = False,
    no_cache: NoCache = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print files, timings and provenance as JSON.")] = False,
) -> None:
    """Run a pipeline and write its result."""
    import ovforge

    overrides = [*(set_ or []), *(f"input.{item}" for item in input_ or [])]
    check_trust(config, overrides, trust)
    if output is not None:
        check_output(config, output, force)
    with progress_bar(quiet or as_json) as progress:
        pipeline = ovforge.load(config, overrides=overrides, cache=_cache(no_cache), progress=progress)
        target = output or _output(config, pipeline)
        check_output(config, target, force)
        if not target.parent.is_dir():
            raise InputError("no such folder", where=str(target.parent), hint="Make it, or name another --output.")
        result = pipeline(progress=progress)
    files = result.save(target)
    if as_json:
        print(json.dumps(_as_json(result, files, pipeline), indent=2))
    elif not quiet:
        print_result(result, files, pipeline)


def plan(
    config: Config,
    set_: Set = None,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what a run would do, and do nothing."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import ovforge

    planned = ovforge.plan(config, overrides=set_ or [], cache=_cache(no_cache))
    if as_json:
        print(json.dumps(asdict(planned), indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "use", "plugin", "state", "size", "why"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=title != "why")
    for stage in planned.stages:
        table.add_row(
            stage.stage,
            stage.use,
            f"{stage.plugin} {stage.version}",
            {"to do": "[yellow]to do[/]", "cached": "[green]cached[/]"}.get(stage.state, stage.state),
            _size(stage.size),
            stage.why,
        )
    # Below this width the reasons would fall into a column of single letters.
    console = Console(highlight=False, width=max(Console().width, 120))
    console.print(table)
    for stage in planned.stages:
        for warning in stage.warnings:
            console.print("[yellow]warning:[/]", escape(warning), soft_wrap=True)


def convert(
    source: Annotated[str, typer.Argument(help="A folder or file of any format that a loader here opens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    option: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of the loader: weights=f32")
    ] = None,
    use: Annotated[str | None, typer.Option("--use", help="The loader; found by content where not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    no_cache: NoCache = False,
) -> None:
    """Convert a model to an OpenVINO folder that ovforge, optimum-intel and openvino-genai open."""
    import ovforge
    from ovforge.config.files import apply_overrides
    from ovforge.model.sources import named_path
    from ovforge.store.folders import check_apart

    if output.exists() and not force:
        raise InputError("is there already", where=str(output), hint="Name another folder, or add --force.")
    check_apart(output, named_path(source, Path.cwd()))
    with progress_bar(False) as progress:
        bundle = ovforge.open_model(
            source,
            use=use,
            options=apply_overrides({}, option or []),
            cache=_cache(no_cache),
            progress=progress,
        )
        bundle.save(output, replace=force)
    print(f"{output}: {', '.join(bundle.models)}")


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of the terminal.")] = None,
) -> None:
    """Print the JSON Schema of configs, with the options of every plugin that is here, for editors."""
    from ovforge.config.schema import config_schema
    from ovforge.plugins.manager import Plugins
    from ovforge.store.files import atomic_write

    text = json.dumps(config_schema(Plugins()), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        atomic_write(output, text.encode())


def _cache(no_cache: bool) -> Cache | str | None:
    return None if no_cache else "default"


def _output(config: Path, pipeline: Pipeline) -> Path:
    """Return where the result goes: the config says, or beside the picture that is run again."""
    if config.suffix.lower() == ".png":
        return config.with_stem(f"{config.stem}-again")
    assert pipeline.config.task is not None
    return Path(pipeline.config.output or f"{pipeline.config.task.use}.png")


@contextmanager
def progress_bar(silent: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar on standard error while work goes on, where that is a terminal; else a line for each stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from ovforge.contracts.stages import ignore_progress

    console = Console(stderr=True, highlight=False)
    if silent:
        yield ignore_progress
        return
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(moment: Progress) -> None:
            if moment.stage not in tasks:
                tasks[moment.stage] = bar.add_task(moment.stage, total=moment.total, note="")
                if not console.is_terminal:
                    console.print(f"{moment.stage}... {moment.note}".rstrip())
            bar.update(tasks[moment.stage], completed=moment.done, total=moment.total, note=moment.note)

        yield show


def print_result(result: Result, files: list[Path], pipeline: Pipeline) -> None:
    """Print timings, what quantizers did, the precision that ran, and the files."""
    from rich.console import Console
    from rich.markup import escape

    from ovforge.cli.reports import print_reports

    console = Console(highlight=False, soft_wrap=True)
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    roles = [role for role, model in pipeline.compiled.all() if model.cached]
    for name, spans in pipeline.start_timings().merged(result.timings).spans.items():
        depth, title = name.count("."), name.rpartition(".")[2].replace("_", " ")
        times = f"  ({len(spans)} x {sum(spans) / len(spans):.3f} s)" if len(spans) > 1 else ""
        cached = "  from the cache" if name.startswith("compile.") and name[8:] in roles else ""
        console.print(f"{'  ' * depth}{title:<{24 - 2 * depth}}{sum(spans):9.3f} s{times}{cached}")
    print_reports(pipeline.resolved.steps, pipeline.reports, pipeline.outcome, warnings=False)
    precision = ", ".join(sorted(set(result.provenance.get("precision", {}).values())))
    device = result.provenance.get("device", {})
    console.print(f"{device.get('full_name', '')} ({device.get('name', '')}), computed in {precision}")
    for file in files:
        console.print(f"[bold]{file}[/]")


def _as_json(result: Result, files: list[Path], pipeline: Pipeline) -> dict[str, Any]:
    from ovforge.cli.reports import reports_as_json

    return {
        "files": [str(file) for file in files],
        "start": pipeline.start_timings().spans,
        "timings": result.timings.spans,
        "warnings": result.warnings,
        "provenance": result.provenance,
        **reports_as_json(pipeline.resolved.steps, pipeline.reports, pipeline.outcome),
    }


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"
