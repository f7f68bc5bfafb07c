"""ovforge tune."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ovforge.cli import Trust
from ovforge.errors import ConfigError, InputError, did_you_mean

if TYPE_CHECKING:
    from ovforge import PipelineConfig, Plugins
    from ovforge_benchmark.tuning.bench import Bench
    from ovforge_benchmark.tuning.schema import Aim, TuningReport
    from ovforge_benchmark.tuning.search import Found

__all__ = ["tune"]

_EVIDENCE = (".md", ".json", ".png")
"""What is written beside the config, by its suffix."""

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
    home = config.resolve() if config.is_symlink() else config  # relative paths start at the file itself
    target = output or home.with_name(f"{config.stem}-tuned.toml")
    if target.suffix != ".toml" or target.absolute().parent.resolve() != home.absolute().parent.resolve():
        raise InputError(
            "the config is written as .toml into the folder of the original, where its relative paths start",
            where=f"--output {target}",
        )
    for file in (target, *(target.with_suffix(suffix) for suffix in _EVIDENCE)):
        if file.resolve() == config.resolve():
            raise InputError(f"it would replace {config}, which is tuned", where=f"--output {target}",
                             hint="Name another file.")  # fmt: skip
        check_writable(file)
    _check_free(target, force)
    check_trust(config, set_ or [], trust)
    original = PipelineConfig.read(config, set_ or [])
    with scratch_folder() as scratch, progress_bar(quiet or as_json) as progress:
        bench = _bench(original, config, aim, samples, prompt or [], metric, scratch, no_cache)
        bench.within = limit
        report, found = _tuned(bench, original, config, min_score, set(without or ()), progress)
    if not report.trials:  # interrupted before there was anything to tell
        raise KeyboardInterrupt
    _check_free(target, force)  # another tuning may have written it meanwhile
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
    from ovforge_benchmark.tuning.changes import changes_for, has_approximations, label_of
    from ovforge_benchmark.tuning.schema import TuningReport
    from ovforge_benchmark.tuning.search import search

    plugins = Plugins()
    _check_names(without, plugins)
    facts = bench.begin()
    changes = [
        change for change in changes_for(original, facts["provenance"]["digests"], plugins) if change.use not in without
    ]
    bench.gate, bench.gate_stays = original.sections.get("quality"), "quality" in original.sections
    if has_approximations(original, plugins) and not bench.gate_stays:
        bench.notes.append(
            "the config has no [quality] of its own, and gets none: it would hold the pipeline against one without "
            "the quantizers and approximations that were there before"
        )
    elif not bench.gate_stays and _reads_quality(plugins):
        bench.gate = _gate(bench, min_score, facts["examples"])
    found = search(bench, changes, min_score, progress)
    report = TuningReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=not found.interrupted and not found.hurried and bench.left() > 0,
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
        warnings=tuple(dict.fromkeys([*disturbances(), *bench.notes, *found.notes])),
    )
    return report, found


def _check_names(without: set[str], plugins: Plugins) -> None:
    """Raise InputError for a name in --without that nothing here has."""
    from ovforge_benchmark.tuning.changes import KINDS

    known = {offer.extension.name for kind in KINDS for offer in plugins.all(kind)}
    for name in sorted(without - known):
        raise InputError(
            f"no extension here has the name {name!r}.{did_you_mean(name, known)}", where="--without",
            hint="`ovforge plugins` lists them.",
        )  # fmt: skip


def _reads_quality(plugins: Plugins) -> bool:
    """Say whether a plugin here reads [quality]."""
    return any("quality" in getattr(offer.extension, "sections", {}) for offer in plugins.all("driver"))


def _gate(bench: Bench, min_score: float, examples: Collection[str]) -> dict[str, Any]:
    """Return the [quality] that holds the winner to what was asked, called as the trials are.

    The task's examples say some inputs of a call; what else the config's [input] has, all calls have in common.
    """
    options = {name: value for name, value in bench.config.get("input", {}).items() if name not in examples}
    asked = {"metric": bench.asked_metric} if bench.asked_metric else {}
    return {"min_score": min_score, **asked, "samples": bench.samples, **({"options": options} if options else {})}


def _write_config(
    target: Path, config: Path, original: PipelineConfig, bench: Bench, report: TuningReport, found: Found
) -> None:
    """Write the winner's config, with what was measured in comments."""
    import tomlkit

    from ovforge.store import atomic_write
    from ovforge_benchmark.tuning.changes import changed
    from ovforge_benchmark.tuning.evidence import cost, score

    assert found.winner is not None
    made = changed(bench.config, found.winner)
    if (gate := bench.gate_of(found.winner)) is not None:
        made["quality"] = dict(gate)
    best = next(trial for trial in report.trials if trial.label == report.winner)
    first = next(trial for trial in report.trials if not trial.changes)
    head = [
        f"# Made by `ovforge tune {config.name}` on {report.machine.cpu}: {report.winner}",
        f"# {cost(report, best)} after {cost(report, first)}; {report.metric} "
        f"{score(report, best.score)} of at least {score(report, report.min_score)}, {best.calls} calls.",
        f"# Evidence: {target.stem}.md",
    ]
    text = "\n".join(line.replace("\r", " ").replace("\n", " ") for line in head)
    atomic_write(target, f"{text}\n\n{tomlkit.dumps(_in_order(made))}".encode())


def _in_order(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its values before its tables, as TOML needs them."""
    return dict(sorted(config.items(), key=lambda item: isinstance(item[1], dict | list)))


def _check_free(target: Path, force: bool) -> None:
    """Raise InputError for a file that would be replaced, unless it is the evidence of a tuning before."""
    for file in (target, *(target.with_suffix(suffix) for suffix in _EVIDENCE)):
        if file.exists() and not force and (file == target or not _is_ours(target)):
            raise InputError(
                "is there already", where=str(file),
                hint="Name another --output, or add --force.",
            )  # fmt: skip


def _is_ours(target: Path) -> bool:
    """Say whether the evidence beside a config that is to be written is that of a tuning before."""
    from ovforge_benchmark.tuning.schema import TuningReport

    try:
        TuningReport.model_validate_json(target.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return False
    return True


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
