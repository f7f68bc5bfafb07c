"""ovforge compare."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.cli import Trust
from ovforge.errors import InputError

__all__ = ["compare"]


def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]WHAT...",
            help="Configs, models, pictures, or diffusers[@f32|bf16]:FOLDER; the first is what others are compared to.",
        ),
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=VALUE,VALUE", help="Each pipeline once a value: device.precision=f32,bf16"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of every pipeline.")
    ] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="NAME=VALUE", help="Set an input of every candidate.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; several make a row of pictures each.")
    ] = None,
    task: Annotated[str, typer.Option("--task", help="What models that are not configs are for.")] = "text-to-image",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Processes of each candidate, in turn.")] = 3,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Measured runs of each call in a process.")] = 3,
    trust: Trust = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing on disk.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write this .md, .json and, of pictures, .png.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run pipelines side by side: pictures, latency, memory, size, likeness.

    Example: ovforge compare a.toml b.toml
    """
    from ovforge.cli import check_trust, check_writable, print_block, print_json, progress_bar
    from ovforge.config import apply_overrides
    from ovforge_benchmark import candidates
    from ovforge_benchmark.compare import compare as run
    from ovforge_benchmark.tables import comparison_markdown

    if output is not None:
        check_writable(output.with_suffix(".md"))
    named = [candidates.parse(one, task, set_ or []) for one in what]
    for one in named:
        if one.kind == "pipeline" and isinstance(one.config, str):
            check_trust(Path(one.config), [*one.overrides, *(f"input.{text}" for text in input_ or [])], trust)
    asked = candidates.varied(named, vary or [])
    if len(asked) < 2:
        raise InputError("one candidate is not a comparison", hint="Name another, or --vary a key.")
    common = apply_overrides({}, input_ or [])
    calls = [{**common, "prompt": text} for text in prompt or ()] or [common]
    with progress_bar(quiet or as_json) as progress:
        report, pictures = run(asked, calls, rounds=rounds, runs=runs, cache=not no_cache, progress=progress)
    sheet = _sheet(report, pictures, [str(call["prompt"]) for call in calls] if len(calls) > 1 else [])
    text = comparison_markdown(report, output.with_suffix(".png").name if output and sheet else None)
    if output is not None:
        _write(output, text, report, sheet)
    if as_json:
        print_json(report.model_dump(mode="json"))
    elif not quiet:
        print_block(text)
    if not report.complete:
        raise KeyboardInterrupt


def _sheet(report: Any, pictures: list[list[Any]], rows: list[str]) -> Any:
    """Return the pictures side by side; None if there are none."""
    import statistics

    from ovforge_benchmark.grid import grid
    from ovforge_benchmark.tables import duration, likeness_title

    if not any(pictures):
        return None
    captions = []
    for one in report.candidates:
        total = one.statistics.get("total")
        facts = [duration(total.median)] if total else []
        facts += [f"{likeness_title(name)} {statistics.fmean(s):.3f}" for name, s in list(one.likeness.items())[:1]]
        captions.append((one.label, ", ".join(facts)))
    return grid(pictures, captions, rows)


def _write(output: Path, text: str, report: Any, sheet: Any) -> None:
    from ovforge.store import atomic_write

    if sheet is not None:
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        atomic_write(output.with_suffix(".png"), buffer.getvalue())
    atomic_write(output.with_suffix(".json"), (report.model_dump_json(indent=2) + "\n").encode())
    atomic_write(output.with_suffix(".md"), text.encode())
