"""run, plan, convert, schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovforge.cli.output import (
    Part,
    collected_warnings,
    print_json,
    print_line,
    print_table,
    print_warning,
    progress_bar,
)
from ovforge.cli.reports import check_folder, check_writable, print_result, result_as_json
from ovforge.cli.trust import Force, Trust, check_output, check_trust
from ovforge.errors import InputError
from ovforge.model.results import PICTURE_SUFFIXES

if TYPE_CHECKING:
    from ovforge.contracts.extensions import TaskExtension
    from ovforge.store.cache import Cache

__all__ = ["NoCache", "convert", "plan", "run", "schema"]

Config = Annotated[Path, typer.Argument(help="A .toml or .json config, or a picture that ovforge made.")]
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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the result, from the current folder.")
    ] = None,
    force: Force = False,
    trust: Trust = False,
    no_cache: NoCache = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print result, files, timings, warnings and provenance as JSON.")
    ] = False,
) -> None:
    """Run a pipeline and write its result.

    Example: ovforge run pipeline.toml -i 'prompt="a red car"' -o car.png
    """
    import ovforge

    overrides = [*(set_ or []), *(f"input.{item}" for item in input_ or [])]
    check_trust(config, overrides, trust)
    target, task = _output(config, overrides, output)
    check_writable(target or Path(task.name), task.result_type())
    if target is not None:
        check_output(config, target, force)
    with collected_warnings() as warnings:
        with progress_bar(quiet or as_json) as progress:
            pipeline = ovforge.load(config, overrides=overrides, cache=_cache(no_cache), progress=progress, trust=True)
            result = pipeline(progress=progress)
        if target is None:  # only the result knows its ending
            target = Path(f"{task.name}{result.suffixes[0]}")
            check_output(config, target, force)
        before = set(target.absolute().parent.iterdir())
        files = result.save(target)
    replaced = [file for file in files if before & {file.absolute(), file.absolute().parent}]
    print_result(result, files, pipeline, quiet=quiet or as_json, replaced=replaced)
    if as_json:
        print_json(result_as_json(result, files, pipeline, warnings))


def plan(
    config: Config,
    set_: Set = None,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what a run would do, and do nothing.

    Example: ovforge plan pipeline.toml -s device.precision=f32
    """
    from dataclasses import asdict

    import ovforge

    planned = ovforge.plan(config, overrides=set_ or [], cache=_cache(no_cache))
    if as_json:
        print_json(asdict(planned))
        return
    colours = {"to do": "yellow", "cached": "green"}
    rows: list[list[Part]] = [
        [
            stage.stage,
            stage.use,
            f"{stage.plugin} {stage.version}",
            (stage.state, colours.get(stage.state, "")),
            _size(stage.size),
            stage.why,
        ]
        for stage in planned.stages
    ]
    print_table(["stage", "use", "plugin", "state", "size", "why"], rows, right=["size"], fold=["why"])
    for stage in planned.stages:
        for warning in stage.warnings:
            print_warning(warning)


def convert(
    source: Annotated[str, typer.Argument(help="A folder or file of any format that a loader here opens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    option: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of the loader: weights=f32")
    ] = None,
    use: Annotated[str | None, typer.Option("--use", help="The loader; found by content if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    no_cache: NoCache = False,
) -> None:
    """Convert a model to an OpenVINO folder that ovforge, optimum-intel and openvino-genai open.

    Example: ovforge convert package:ovforge_lcm/model -o models/lcm
    """
    import ovforge
    from ovforge.config.files import apply_overrides
    from ovforge.model.sources import named_path
    from ovforge.store.folders import check_apart

    if output.exists() and not force:
        raise InputError("is there already", where=str(output), hint="Name another folder, or add --force.")
    check_apart(output, named_path(source, Path.cwd()))
    check_folder(output.parent)
    with progress_bar(False) as progress:
        bundle = ovforge.open_model(
            source,
            use=use,
            options=apply_overrides({}, option or []),
            cache=_cache(no_cache),
            progress=progress,
        )
        bundle.save(output, replace=force)
    print_line(f"{output}: {', '.join(bundle.models)}")


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of the terminal.")] = None,
) -> None:
    """Print the JSON Schema of configs, with the options of every plugin that is here, for editors.

    Example: ovforge schema -o ovforge.schema.json
    """
    from ovforge.config.schema import config_schema
    from ovforge.plugins.manager import Plugins
    from ovforge.store.files import atomic_write

    value = config_schema(Plugins())
    if output is None:
        print_json(value)
    else:
        atomic_write(output, f"{json.dumps(value, indent=2)}\n".encode())


def _cache(no_cache: bool) -> Cache | str | None:
    return None if no_cache else "default"


def _output(config: Path, overrides: Sequence[str], output: Path | None) -> tuple[Path | None, TaskExtension]:
    """Return where the result goes, and its task.

    As asked, beside the picture that is run again, or as the config says. By default it is named after the task, with
    an ending of the result's own: None if only the result knows that one.
    """
    from ovforge.contracts.extensions import TaskExtension
    from ovforge.plugins.manager import Plugins
    from ovforge.run.resolution import read_pipeline
    from ovforge.run.tasks import require_task

    checked = read_pipeline(config, overrides)[0]
    require_task(checked)
    assert checked.task is not None
    extension = Plugins().find("task", checked.task.use).extension
    assert isinstance(extension, TaskExtension)
    kind = extension.result_type()
    if output is not None:
        return output, extension
    if config.suffix.lower() in PICTURE_SUFFIXES and (kind is None or config.suffix.lower() in kind.suffixes):
        return config.with_stem(f"{config.stem}-again"), extension
    if checked.output:
        return Path(checked.output), extension
    return Path(f"{extension.name}{kind.suffixes[0]}") if kind else None, extension


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"
