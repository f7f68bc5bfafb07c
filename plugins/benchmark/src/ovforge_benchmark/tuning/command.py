"""ovforge tune."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ovforge.cli import Trust
from ovforge.errors import ConfigError, InputError

if TYPE_CHECKING:
    from ovforge import PipelineConfig
    from ovforge_benchmark.tuning.bench import Bench
    from ovforge_benchmark.tuning.schema import Aim, TuningReport
    from ovforge_benchmark.tuning.search import Found

__all__ = ["tune"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "": 60}


def tune(
    config: Annotated[Path, typer.Argument(help="The pipeline's .toml or .json.")],
    min_score: Annotated[
        float, typer.Option("--min-score", help="How close results must come to the original's; equal ones have 1.")
    ] = 0.95,
    aim: Annotated[
        Literal["latency", "throughput", "memory"], typer.Option("--for", help="What is to be better.")
    ] = "latency",
    within: Annotated[
        str | None, typer.Option("--within", help="The time that it may take: 90s, 30m, 2h; by default as it takes.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="ssim, psnr, gmsd or task; by default the results' own.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calls that decide in the end.")] = 8,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt to judge by, instead of the task's examples; several are good."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="NAME", help="An extension that is not to be tried.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The config to write; by default CONFIG-tuned.toml beside it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the config if it is there.")] = False,
    trust: Trust = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing on disk: it cannot be resumed.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find the fastest pipeline that still gives the same results, and write its config with the evidence.

    It tries what the installed extensions offer: precision, quantizers, approximations, settings of the device. Run it
    again after an interruption, and it goes on.

    Example: ovforge tune pipeline.toml --min-score 0.95 --within 30m
    """
    from ovforge import PipelineConfig
    from ovforge.cli import check_trust, check_writable, print_block, print_json, print_line, progress_bar
    from ovforge.store import scratch_folder
    from ovforge_benchmark.tuning.evidence import markdown

    if not math.isfinite(min_score):
        raise InputError("is not a finite number", where="--min-score", hint="Example: 0.95")
    if config.suffix.lower() not in (".toml", ".json"):
        raise InputError("is not a config", where=str(config), hint="Name a .toml or .json file.")
    limit = _seconds(within) if within else None
    target = output or config.with_name(f"{config.stem}-tuned.toml")
    if target.suffix != ".toml" or target.absolute().parent.resolve() != config.absolute().parent.resolve():
        raise InputError(
            "the config is written as .toml into the folder of the original, where its relative paths start",
            where=f"--output {target}",
        )
    if target.exists() and not force:
        raise InputError("is there already", where=str(target), hint="Name another --output, or add --force.")
    check_writable(target)
    check_trust(config, set_ or [], trust)
    original = PipelineConfig.read(config, set_ or [])
    with scratch_folder() as scratch, progress_bar(quiet or as_json) as progress:
        bench = _bench(original, config, aim, samples, prompt or [], metric, scratch, no_cache)
        bench.within = limit
        report, found = _tuned(bench, original, config, min_score, set(without or ()), progress)
    if found.winner is not None:
        _write_config(target, config, original, bench, report, found)
    _write_evidence(target, report)
    if as_json:
        print_json(report.model_dump(mode="json"))
    elif not quiet:
        print_block(markdown(report))
        if found.winner is not None:
            print_line(f"{target}: written; see it beside the original: ovforge compare {config} {target}")
    if found.interrupted:
        raise KeyboardInterrupt


def _bench(
    original: PipelineConfig, config: Path, aim: Aim, samples: int, prompts: list[str], metric: str | None,
    scratch: Path, no_cache: bool,
) -> Bench:  # fmt: skip
    from ovforge.model import METRICS, OWN_METRIC
    from ovforge.store import Cache
    from ovforge_benchmark.tuning.bench import Bench
    from ovforge_benchmark.tuning.changes import plain

    if metric is not None and metric not in (*METRICS, OWN_METRIC):
        raise InputError(f"{metric!r} is not a metric", where="--metric", hint=f"Known: {', '.join(METRICS)}, task.")
    if original.task is None:
        raise ConfigError("`task` is missing", where=str(config), hint="Say what the pipeline is for: task = ...")
    return Bench(
        config=plain(original),
        base=config.resolve().parent,
        samples=min(samples, len(prompts)) if prompts else samples,
        aim=aim,
        scratch=scratch,
        prompts=prompts,
        asked_metric=metric,
        cache=None if no_cache else Cache.default(),
    )


def _tuned(
    bench: Bench, original: PipelineConfig, config: Path, min_score: float, without: set[str], progress: Any
) -> tuple[TuningReport, Found]:
    from datetime import UTC, datetime

    from ovforge import Plugins
    from ovforge_benchmark.machine import machine
    from ovforge_benchmark.noise import disturbances
    from ovforge_benchmark.tuning.changes import changes_for, label_of
    from ovforge_benchmark.tuning.schema import TuningReport
    from ovforge_benchmark.tuning.search import search

    plugins = Plugins()
    facts = bench.begin()
    changes = [
        change for change in changes_for(original, facts["provenance"]["digests"], plugins) if change.use not in without
    ]
    if "quality" in {name for offer in plugins.all("driver") for name in getattr(offer.extension, "sections", {})}:
        bench.gate = original.sections.get("quality") or _gate(bench, min_score)
    found = search(bench, changes, min_score, progress)
    report = TuningReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=not found.interrupted and bench.left() > 0,
        what=str(config),
        aim=bench.aim,
        metric=bench.metric,
        min_score=min_score,
        samples=bench.samples,
        machine=machine(),
        trials=tuple(found.trials),
        winner=None if found.winner is None else label_of(found.winner),
        duel=found.duel,
        left_out=tuple(dict.fromkeys(found.left_out)),
        warnings=tuple(dict.fromkeys([*disturbances(), *found.notes])),
    )
    return report, found


def _gate(bench: Bench, min_score: float) -> dict[str, Any]:
    """Return the [quality] that holds the winner to what was asked, with inputs of the config's own kind."""
    given = bench.config.get("input", {})
    options = {name: given[name] for name in ("steps", "guidance_scale", "width", "height") if name in given}
    asked = {"metric": bench.asked_metric} if bench.asked_metric else {}
    return {"min_score": min_score, **asked, "samples": bench.samples, **({"options": options} if options else {})}


def _write_config(
    target: Path, config: Path, original: PipelineConfig, bench: Bench, report: TuningReport, found: Found
) -> None:
    """Write the winner's config, with what was measured in comments."""
    import tomlkit

    from ovforge.store import atomic_write
    from ovforge_benchmark.tables import duration
    from ovforge_benchmark.tuning.changes import changed
    from ovforge_benchmark.tuning.evidence import score

    assert found.winner is not None
    made = changed(bench.config, found.winner)
    if bench.gate is not None and any(change.kind in ("quantizer", "transform") for change in found.winner):
        made["quality"] = dict(bench.gate)
    best = next(trial for trial in report.trials if trial.label == report.winner)
    first = next(trial for trial in report.trials if not trial.changes)
    head = [
        f"# Made by `ovforge tune {config.name}` on {report.machine.cpu}: {report.winner}",
        f"# {duration(best.seconds)} a call after {duration(first.seconds)}; {report.metric} "
        f"{score(report, best.score)} of at least {score(report, report.min_score)}, {best.calls} calls.",
        f"# Evidence: {target.stem}.md",
    ]
    text = "\n".join(line.replace("\r", " ").replace("\n", " ") for line in head)
    atomic_write(target, f"{text}\n\n{tomlkit.dumps(_in_order(made))}".encode())


def _in_order(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its values before its tables, as TOML needs them."""
    return dict(sorted(config.items(), key=lambda item: isinstance(item[1], dict | list)))


def _write_evidence(target: Path, report: TuningReport) -> None:
    from ovforge.store import atomic_write
    from ovforge_benchmark.tuning.evidence import markdown, picture

    buffer = io.BytesIO()
    picture(report).save(buffer, "PNG", optimize=True)
    atomic_write(target.with_suffix(".png"), buffer.getvalue())
    atomic_write(target.with_suffix(".json"), (report.model_dump_json(indent=2) + "\n").encode())
    atomic_write(target.with_suffix(".md"), markdown(report, target.with_suffix(".png").name).encode())


def _seconds(text: str) -> float:
    """Return the seconds of "90s", "30m" or "2h"; a number alone is minutes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"{text!r} is not a time", where="--within", hint="Write 90s, 30m or 2h.")
    return float(found[1]) * _UNITS[found[2]]
