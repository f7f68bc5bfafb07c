"""From a config to a recipe: every name found and every option checked, before anything is read or converted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ovforge.config.files import apply_overrides, read_config
from ovforge.config.options import input_files, validate_options
from ovforge.config.pipeline import CalibrationTable, PipelineConfig, Use
from ovforge.contracts.extensions import GraphTransformExtension, TaskExtension
from ovforge.contracts.stages import Match, Phase
from ovforge.errors import ConfigError, ModelError, did_you_mean
from ovforge.model.results import read_provenance
from ovforge.model.sources import Protection, Source
from ovforge.plugins.manager import Offer, Plugins
from ovforge.run.examples import Examples, check_apart, read_examples
from ovforge.run.opening import open_file, open_source
from ovforge.store.cache import Cache

__all__ = ["Origin", "Recipe", "Step", "find_loader", "make_recipe", "make_step", "options_of", "read_pipeline"]


@dataclass(frozen=True)
class Step:
    """A transform or quantizer with its checked options; `brought` by the task, or asked for by the config."""

    kind: str
    offer: Offer
    options: BaseModel | None
    phase: Phase
    brought: bool = False

    @property
    def light(self) -> bool:
        """Whether its changes are made again rather than stored."""
        return isinstance(self.offer.extension, GraphTransformExtension) and self.offer.extension.light


@dataclass(frozen=True)
class Origin:
    """A source with the loader that opens it."""

    source: Source
    loader: Offer
    options: BaseModel | None


@dataclass(frozen=True)
class Recipe:
    """A config with every name found and every option checked; nothing has been read or converted yet."""

    config: PipelineConfig
    base: Path
    origin: Origin
    parts: Mapping[str, Origin]
    protection: Protection | None
    """Of the first encrypted source or file; it covers all that is stored, since steps mix what they are given."""
    steps: tuple[Step, ...]
    task: Offer
    task_options: BaseModel | None
    scheduler: Offer | None
    scheduler_options: BaseModel | None
    device: Offer
    device_options: BaseModel | None
    calibration: Examples
    held_out: Examples
    """What quantized pipelines are judged by."""

    @property
    def quantizers(self) -> tuple[Step, ...]:
        """The quantizers' steps; no other step lies between them."""
        return tuple(step for step in self.steps if step.kind == "quantizer")

    @property
    def after(self) -> tuple[Step, ...]:
        """The steps after the last quantizer."""
        last = max((n for n, step in enumerate(self.steps) if step.kind == "quantizer"), default=-1)
        return self.steps[last + 1 :]

    @property
    def task_extension(self) -> TaskExtension:
        """The task's description."""
        assert isinstance(self.task.extension, TaskExtension)
        return self.task.extension


def read_pipeline(
    config: str | Path | Mapping[str, Any] | PipelineConfig, overrides: Iterable[str] = ()
) -> tuple[PipelineConfig, Path]:
    """Return a checked config and the folder that its relative paths start at.

    A path may name a .toml or .json config, or a picture that ovforge made.
    """
    if isinstance(config, PipelineConfig):
        if overrides:
            value = apply_overrides({**config.as_dict(), "load": _load_table(config)}, overrides)
            return PipelineConfig.of(value), Path.cwd()
        return config, Path.cwd()
    if isinstance(config, Mapping):
        return PipelineConfig.of(apply_overrides(dict(config), overrides)), Path.cwd()
    path = Path(config)
    if path.suffix.lower() == ".png":
        provenance = read_provenance(path)
        value = {**provenance["config"], "input": {**provenance["config"].get("input", {}), **provenance["inputs"]}}
        if isinstance(value.get("load"), Mapping) and "key" in value["load"]:
            # ovforge writes none; and a key may be the output of a command, which a picture must not choose.
            raise ConfigError("a picture may not say where a key is", where=str(path), hint="Do not run it.")
        if isinstance(value.get("quality"), Mapping):  # nor may it choose where to write
            value["quality"] = {name: part for name, part in value["quality"].items() if name != "save"}
        base = Path(provenance.get("base", ""))
        return PipelineConfig.of(
            apply_overrides(value, overrides), where=str(path)
        ), base if base.is_dir() else Path.cwd()
    value = read_config(path)
    return PipelineConfig.of(apply_overrides(value, overrides), where=str(path)), path.resolve().parent


def _load_table(config: PipelineConfig) -> dict[str, Any]:
    """Return `load` with its key, which dumps of a config leave out."""
    table = config.load.model_dump(exclude_defaults=True)
    return {**table, "key": config.load.key} if config.load.key is not None else table


def make_recipe(config: PipelineConfig, base: Path, plugins: Plugins, cache: Cache | None) -> Recipe:
    """Find every name and check every option, so that a mistake is known before any work starts."""
    task = plugins.find("task", config.task.use)
    _check_inputs(config, task)
    calibration, held_out = _data(config, task, base)
    checked_task = options_of(task, config.task.options, "task", base)
    device = plugins.find("device", config.device.use)
    device_options = options_of(device, config.device.options, "device", base)
    scheduler = plugins.find("scheduler", config.scheduler.use) if config.scheduler else None
    scheduler_options = (
        options_of(scheduler, config.scheduler.options, "scheduler", base) if scheduler and config.scheduler else None
    )
    steps = [
        *(make_step(plugins, "transform", use, f"transform.{n}", base) for n, use in enumerate(config.transform)),
        *(make_step(plugins, "quantizer", use, f"quantize.{n}", base) for n, use in enumerate(config.quantize)),
        *_brought(plugins, config, task, base),
    ]
    memo = cache.memo if cache else None
    open_ = partial(open_source, base=base, memo=memo, key=_key(config, base), plugins=plugins)
    source = open_(config.load.source)
    loader = find_loader(source, config.load.use, plugins)
    parts = {role: _part(role, open_(text), plugins) for role, text in config.load.parts.items()}
    files = (open_file(path, memo, plugins) for step in steps for path in input_files(step.options) if path.exists())
    sources = itertools.chain([source], (part.source for part in parts.values()), files)
    protection = next((source.protection for source in sources if source.protection), None)
    if config.load.key is not None and protection is None:
        raise ConfigError("a key is given, and nothing is encrypted", where="load.key", hint="Take it out.")
    return Recipe(
        config=config,
        base=base,
        origin=Origin(source, loader, options_of(loader, config.load.options, "load", base)),
        parts=parts,
        protection=protection,
        steps=tuple(sorted(steps, key=lambda step: step.phase)),
        task=task,
        task_options=checked_task,
        scheduler=scheduler,
        scheduler_options=scheduler_options,
        device=device,
        device_options=device_options,
        calibration=calibration,
        held_out=held_out,
    )


def _data(config: PipelineConfig, task: Offer, base: Path) -> tuple[Examples, Examples]:
    """Return the inputs that calibrate and those that judge, read and checked before any work."""
    assert isinstance(task.extension, TaskExtension)
    for key in ("calibration", "quality"):
        if getattr(config, key) is not None and not config.quantize:
            raise ConfigError("it is of use to quantizers, and there is none", where=key, hint="Add [[quantize]].")
    model, name = task.extension.inputs_model(), task.extension.name
    ours = config.calibration or CalibrationTable()
    calibration = read_examples(ours, model, base, key="calibration", task=name)
    # Without a table of its own, what is judged by is called as what is calibrated with.
    table = config.quality or CalibrationTable(options=ours.options, seed=ours.seed)
    if config.quality is not None and not table.options:
        table = table.model_copy(update={"options": ours.options})
    held_out = read_examples(table, model, base, key="quality", task=name)
    check_apart(calibration, held_out)
    return calibration, held_out


def _key(config: PipelineConfig, base: Path) -> dict[str, Any] | None:
    """Return `load.key`, its file's path starting at the config's folder like all others."""
    key = config.load.key
    if key and isinstance(key.get("file"), str | Path):
        return {**key, "file": base / Path(key["file"]).expanduser()}
    return key


def _part(role: str, source: Source, plugins: Plugins) -> Origin:
    """Return a role's own source; its loader is found by content and has no options."""
    loader = find_loader(source, None, plugins)
    return Origin(source, loader, options_of(loader, {}, f"load.parts.{role}", Path()))


def _check_inputs(config: PipelineConfig, task: Offer) -> None:
    """Refuse an unknown input before any work; values are checked by the call, which may bring the missing ones."""
    assert isinstance(task.extension, TaskExtension)
    known = task.extension.inputs_model().model_fields
    for name in config.input:
        if name not in known:
            raise ConfigError(
                f"unknown input `{name}`.{did_you_mean(name, known)}",
                where="input",
                hint=f"{task.extension.name} takes: {', '.join(known)}.",
            )


def options_of(offer: Offer, options: Mapping[str, Any], key: str, base: Path) -> BaseModel | None:
    where = f"{key} ({offer.extension.name})"
    return validate_options(offer.extension.options_model(), options, where=where, base=base)


def make_step(plugins: Plugins, kind: str, use: Use, key: str, base: Path) -> Step:
    offer = plugins.find(kind, use.use)
    options = options_of(offer, use.options, key, base)
    phase: Any = Phase.PRECISION
    if isinstance(offer.extension, GraphTransformExtension):
        phase = offer.extension.phase
    return Step(kind, offer, options, phase(options) if callable(phase) else phase)


def _brought(plugins: Plugins, config: PipelineConfig, task: Offer, base: Path) -> Iterable[Step]:
    """Give the task's own transforms, but for those that the config names itself."""
    assert isinstance(task.extension, TaskExtension)
    named = {use.use for use in config.transform}
    for name in task.extension.transforms if config.optimize else ():
        if name not in named:
            yield replace(
                make_step(plugins, "transform", Use(name), f"task ({task.extension.name})", base), brought=True
            )


def find_loader(source: Source, name: str | None, plugins: Plugins) -> Offer:
    """Return the loader named, or the one that is surest of the source; what is built in is asked first."""
    if name is not None:
        return plugins.find("loader", name)
    native = plugins.find("loader", "openvino")
    if _match(native, source) is Match.YES:
        return native
    offers = plugins.all("loader")
    matches = sorted(((_match(offer, source), offer.extension.name, offer) for offer in offers), key=lambda m: m[:2])
    best = [offer for match, _, offer in matches if match is matches[-1][0]]
    if matches[-1][0] is Match.NO:
        looks = ", ".join(list(source.files())[:5]) or "nothing"
        raise ModelError(
            "no loader knows what this is",
            where=source.name,
            hint=f"It holds: {looks}. Loaders here: {', '.join(offer.extension.name for offer in offers)}; "
            "for a diffusers folder run: pip install 'ovforge-diffusers[convert]'; "
            "for an encrypted model (.ovenc): pip install ovforge-aes-loader",
        )
    if len(best) > 1:
        names = ", ".join(offer.extension.name for offer in best)
        raise ConfigError(f"several loaders take this source: {names}", where=source.name, hint="Set load.use to one.")
    return best[0]


def _match(offer: Offer, source: Source) -> Match:
    # A loader may look at a source only without its options: they are not known to be meant for it.
    model = offer.extension.options_model()
    found: Match = offer.extension.create(model() if model else None).can_load(source)
    return found
