"""quantize: lower precision of a model's roles and write the result as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovforge.cli import (
    Trust,
    check_folder,
    check_trust,
    print_json,
    print_line,
    print_note,
    print_reports,
    print_table,
    progress_bar,
    reports_as_json,
)
from ovforge.errors import ConfigError, InputError, ModelError, PluginError

if TYPE_CHECKING:
    from ovforge import Plugins, Prepared

__all__ = ["quantize"]

_CONFIGS = {".toml", ".json"}
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep nothing on disk, and use nothing that is there.")]


def quantize(
    source: Annotated[
        str | None, typer.Argument(help="A model that a loader here opens, or a pipeline's .toml or .json.")
    ] = None,
    use: Annotated[
        list[str] | None, typer.Option("--quantizer", "-q", metavar="NAME", help="A quantizer or recipe; see --list.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write; by default SOURCE-NAME, here.")
    ] = None,
    role: Annotated[
        list[str] | None, typer.Option("--role", metavar="ROLE", help="A model to quantize: unet, vae_decoder...")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of the quantizer.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="What calibrates and judges; found by the model's roles.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", "-c", help="Inputs: lines of text, .jsonl, a folder of pictures, or arrays (.npz)."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Records of each role to calibrate with.")] = None,
    runs: Annotated[int | None, typer.Option("--runs", help="Calls of the pipeline to record.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="ssim, psnr, gmsd or task.")] = None,
    min_score: Annotated[float | None, typer.Option("--min-score", help="The score to reach.")] = None,
    max_drop: Annotated[float | None, typer.Option("--max-drop", help="How far the score may fall from 1.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Keep the layers in higher precision that matter.")] = False,
    list_: Annotated[bool, typer.Option("--list", "-l", help="List all quantizers and recipes.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    trust: Trust = False,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize a model, calibrated by its own pipeline, and write it as a folder.

    Example: ovforge quantize models/lcm -q weights-int8 -o models/lcm-int8
    """
    from ovforge import Plugins

    plugins = Plugins()
    if list_:
        _print_list(plugins, as_json)
        return
    if source is None:
        raise InputError("no model is named", where="SOURCE", hint="Name one, or see --list.")
    tables = _tables(calibration, samples, runs, metric, min_score, max_drop, search)
    if Path(source).suffix.lower() in _CONFIGS:
        check_trust(Path(source), [], trust)
    config, base = _config(source, task, tables, plugins)
    if use:
        config["quantize"] = [{"use": name, **_options(name, role or [], option or [], plugins)} for name in use]
    elif role or option or not config.get("quantize"):
        raise InputError("no quantizer is named", where="--quantizer", hint="See `ovforge quantize --list`.")
    target = output or Path(f"{_name(source)}-{'-'.join(_names(config))}")
    if target.exists() and not force:
        raise InputError("is there already", where=str(target), hint="Name another folder, or add --force.")
    check_folder(target.parent)
    _check_apart(target, config, base)
    _check_plain(config, base, plugins)
    try:
        with progress_bar(as_json) as progress:
            if "task" in config or Path(source).suffix.lower() in _CONFIGS:
                prepared = _prepare(config, base, plugins, no_cache, progress)
            else:
                prepared = _prepare_model(config, base, plugins, no_cache, progress)
        _write(prepared, target, force)
    except KeyboardInterrupt:
        kept = "" if no_cache else "; what was recorded and tried is kept: the same command goes on from there"
        print_note(f"interrupted, nothing was written{kept}")
        raise typer.Exit(130) from None
    _print(prepared, target, as_json)


def _check_apart(target: Path, config: dict[str, Any], base: Path) -> None:
    """Refuse a target that holds, or lies in, what the model is read from."""
    from ovforge.model import named_path
    from ovforge.store import check_apart

    load = config.get("load")
    table = load if isinstance(load, dict) else {"source": load}
    parts = table.get("parts")
    named = [table.get("source"), *(parts.values() if isinstance(parts, dict) else ())]
    check_apart(target, *(named_path(text, base) for text in named if isinstance(text, str)))


def _check_plain(config: dict[str, Any], base: Path, plugins: Plugins) -> None:
    """Refuse an encrypted model before any work: what is written of it would be plain."""
    from ovforge import PipelineConfig, describe_protection

    load = PipelineConfig.of({"task": "none", **config}).load
    for name in (load.source, *load.parts.values()):
        if load.key is not None or describe_protection(name, base, plugins):
            raise ModelError(
                "it is encrypted, and the quantized folder would be plain", where=name,
                hint="Decrypt it first (ovforge decrypt), quantize, and encrypt the result (ovforge encrypt).",
            )  # fmt: skip


def _tables(
    calibration: Path | None,
    samples: int | None,
    runs: int | None,
    metric: str | None,
    min_score: float | None,
    max_drop: float | None,
    search: bool,
) -> dict[str, Any]:
    """Return the config's [calibration] and [quality] as the command line has them."""
    data = {"file": str(calibration.absolute()) if calibration else None, "samples": samples, "runs": runs}
    gate = {"metric": metric, "min_score": min_score, "max_drop": max_drop, "on_fail": "search" if search else None}
    given = ({name: value for name, value in table.items() if value is not None} for table in (data, gate))
    return {name: table for name, table in zip(("calibration", "quality"), given, strict=True) if table}


def _config(source: str, task: str | None, tables: dict[str, Any], plugins: Plugins) -> tuple[dict[str, Any], Path]:
    """Return a config to prepare, without what a pipeline brings to run faster: that is for who runs the result."""
    from ovforge.config import read_config

    path = Path(source)
    if path.suffix.lower() in _CONFIGS:
        config, base = read_config(path), path.resolve().parent
        config |= {"task": task} if task else {}
        merged = {name: {**config.get(name, {}), **table} for name, table in tables.items()}
        return {**config, **merged, "optimize": False}, base
    # What a model leaves out is printed, rather than refused: nobody asked for that layer by name.
    return {
        **({"task": task} if task else {}),
        "load": source,
        **tables,
        "optimize": False,
        "strict": False,
    }, Path.cwd()


def _options(name: str, roles: list[str], given: list[str], plugins: Plugins) -> dict[str, Any]:
    """Return a quantizer's options; one without `roles` has no choice of models."""
    from ovforge.config import apply_overrides

    model = plugins.find("quantizer", name).extension.options_model()
    if roles and (model is None or "roles" not in model.model_fields):
        raise ConfigError("it has no choice of models", where=f"{name} --role", hint="Leave --role out.")
    return apply_overrides({"roles": roles} if roles else {}, given)


def _names(config: dict[str, Any]) -> list[str]:
    return [use if isinstance(use, str) else str(use.get("use")) for use in config["quantize"]]


def _name(source: str) -> str:
    return Path(source.rstrip("/")).stem or "model"


def _prepare(config: dict[str, Any], base: Path, plugins: Plugins, no_cache: bool, progress: Any) -> Prepared:
    import ovforge

    cache = None if no_cache else "default"
    return ovforge.prepare(config, base=base, plugins=plugins, cache=cache, progress=progress)


def _prepare_model(config: dict[str, Any], base: Path, plugins: Plugins, no_cache: bool, progress: Any) -> Prepared:
    """Quantize a model by itself: with the first task that runs it, or without one."""
    from ovforge_quality.arrays import are_arrays

    file = config.get("calibration", {}).get("file")
    found = None if file and are_arrays(Path(file)) else _task_for(config["load"], base, plugins, no_cache)
    if found is None and "quality" in config:
        raise PluginError(
            "no task here runs this model", where="quality",
            hint="Name the task with --task, or install the plugin that has it.",
        )  # fmt: skip
    return _prepare({**config, **({"task": found} if found else {})}, base, plugins, no_cache, progress)


def _task_for(source: str, base: Path, plugins: Plugins, no_cache: bool) -> str | None:
    """Return the first task that has all its roles in a model; None if none has."""
    import ovforge
    from ovforge.contracts import TaskExtension

    cache = None if no_cache else "default"
    roles = set(ovforge.open_model(source, base=base, plugins=plugins, cache=cache).models)
    for offer in plugins.all("task"):
        if isinstance(offer.extension, TaskExtension) and offer.extension.fits(roles):
            return offer.extension.name
    return None


def _write(prepared: Prepared, target: Path, force: bool) -> None:
    bundle = prepared.bundle
    if not any(report.roles for report in prepared.quantized):
        said = "; ".join(f"{skip.item}: {skip.reason}" for report in prepared.quantized for skip in report.skipped)
        raise ModelError(f"nothing could be quantized: {said or 'no model was changed'}", where=str(target))
    if adjustable := [*bundle.controls, *bundle.adapters]:
        raise ModelError(
            f"a folder cannot hold what stays adjustable while a pipeline runs: {', '.join(adjustable)}",
            where=str(target),
            hint="Fuse the adapters, or leave them out and put them on the quantized folder.",
        )
    bundle.save(target, replace=force)


def _print(prepared: Prepared, target: Path, as_json: bool) -> None:
    if as_json:
        reports = reports_as_json(prepared.steps, prepared.reports, prepared.outcome)
        print_json({"folder": str(target), **reports})
        return
    print_reports(prepared.steps, prepared.reports, prepared.outcome)
    print_line(str(target))


def _print_list(plugins: Plugins, as_json: bool) -> None:
    offers = sorted(plugins.all("quantizer"), key=lambda offer: (offer.plugin, offer.extension.name))
    if as_json:
        rows = [
            {"name": offer.extension.name, "plugin": offer.plugin, "summary": offer.extension.summary}
            for offer in offers
        ]
        print_json(rows)
        return
    table = [[offer.extension.name, f"{offer.plugin} {offer.version}", offer.extension.summary] for offer in offers]
    print_table(["quantizer", "plugin", "summary"], table, fold=["summary"])
