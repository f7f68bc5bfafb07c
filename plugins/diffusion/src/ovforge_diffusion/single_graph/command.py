"""`ovforge single-graph`: a text-to-image pipeline as one graph, in a folder with what it takes and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovforge.cli import Trust
from ovforge.errors import ConfigError, InputError

__all__ = ["single_graph"]


def single_graph(
    config: Annotated[Path, typer.Argument(help="The pipeline's config, .toml or .json.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write: model.xml, model.bin, README.md.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="NAME=VALUE", help="Set an input: steps=8")
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=0, max=256, help="Pictures at once; 0 takes any number, which runs slower.")
    ] = 1,
    guidance_input: Annotated[
        bool, typer.Option("--guidance-input", help="Let each call give its guidance_scale.")
    ] = False,
    unroll: Annotated[
        bool, typer.Option("--unroll", help="Write the steps one after another, for devices without loops.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing of models elsewhere on disk.")] = False,
    trust: Trust = False,
) -> None:
    """Write a text-to-image pipeline as one OpenVINO graph: prompt in, picture out, without Python.

    Size, steps, sampling method and guidance are those of the config.

    Example: ovforge single-graph examples/unicorn.toml -o unicorn-graph
    """
    from ovforge import Pipeline, PipelineConfig
    from ovforge.cli import check_folder, check_trust, print_line, print_warning, progress_bar
    from ovforge.model import named_path
    from ovforge.store import check_apart, check_replaceable
    from ovforge_diffusion.single_graph import export
    from ovforge_diffusion.single_graph.folder import write_folder

    overrides = [*(set_ or []), *(f"input.{item}" for item in input_ or [])]
    check_trust(config, overrides, trust)
    if output.exists() and not force:
        raise InputError("is there already", where=str(output), hint="Name another folder, or add --force.")
    if output.exists():
        check_replaceable(output)
    checked = PipelineConfig.read(config, overrides)
    if checked.task is None:
        raise ConfigError("`task` is missing", where=str(config), hint='Write: task = "text-to-image".')
    export.check_config(checked, config.parent)
    # Nothing is compiled before it is asked for: the graph takes the models as they are.
    task = checked.task.model_copy(update={"low_memory": True})
    check_apart(
        output, *(named_path(source, config.parent) for source in (checked.load.source, *checked.load.parts.values()))
    )
    check_folder(output.parent)
    with progress_bar(False) as progress:
        pipe = Pipeline.from_config(
            checked.model_copy(update={"task": task}),
            base=config.parent,
            cache=None if no_cache else "default",
            progress=progress,
        )
        made = export.single_graph(pipe, pictures_at_once=batch or None, unroll=unroll, guidance_input=guidance_input)
        write_folder(made, output, replace=force)
    for warning in [*pipe.warnings(), *made.request.remarks]:
        print_warning(warning)
    if made.unused:
        print_warning(f"callers give these inputs themselves: {', '.join(made.unused)}")
    if checked.input.get("count") is not None:
        print_warning("input.count has no effect: --batch says how many pictures are made at once")
    if "device" in checked.as_dict():
        print_warning(
            "callers choose the device and its precision when they compile the graph: "
            "the config's `device` has no effect on it"
        )
    print_line(f"{output}: {', '.join(port.any_name for port in made.model.inputs)} -> image")
