"""From a config to a running pipeline: the only module that knows the order of the stages.

config -> Recipe (every name found, every option checked) -> bundle -> compiled models -> task.
Each stage's result is looked up in the cache by the content of what went in, before it is made.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

import ovforge
from ovforge import memory
from ovforge.adapters import Adapters, Controls
from ovforge.bundle import Control, ModelBundle, path_of, write_json
from ovforge.cache import Cache, Entry, digest_file, key_of
from ovforge.compiled import CompiledBundle, Shapes, compile_ingredients
from ovforge.config import (
    CalibrationTable,
    PipelineConfig,
    Use,
    apply_overrides,
    checked,
    input_files,
    read_config,
    validate_options,
)
from ovforge.errors import ConfigError, ModelError, PluginError, did_you_mean
from ovforge.examples import Examples, check_apart, read_examples
from ovforge.extensions import (
    GraphTransformExtension,
    LoaderExtension,
    QuantizerExtension,
    SchedulerExtension,
    TaskExtension,
    resolve,
)
from ovforge.plugins import Offer, Plugins
from ovforge.quality import Outcome, outcome_of
from ovforge.quantization import Quantization
from ovforge.results import Result, Timings, read_provenance
from ovforge.runtime import openvino_version
from ovforge.sources import PACKAGE, FileSource, Protection, Source, open_file, open_source, source_digest
from ovforge.stages import (
    Adapter,
    Calibration,
    DevicePlan,
    Match,
    Phase,
    Progress,
    Report,
    Scheduler,
    Skipped,
    Task,
    TaskContext,
    ignore_progress,
)

__all__ = ["Pipeline", "Plan", "PlannedStage", "load", "plan"]

_STAGE_FILE = "stage.json"


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


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan. `state` is "cached", "to do", or "direct" where there is nothing to store."""

    stage: str
    use: str
    plugin: str
    version: str
    state: str
    why: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a pipeline would do."""

    stages: tuple[PlannedStage, ...]
    config: dict[str, Any] = field(default_factory=dict)


# -- config -> recipe ---------------------------------------------------------------------------------------------


def make_recipe(config: PipelineConfig, base: Path, plugins: Plugins, cache: Cache | None) -> Recipe:
    """Find every name and check every option, so that a mistake is known before any work starts."""
    task = plugins.find("task", config.task.use)
    _check_inputs(config, task)
    calibration, held_out = _data(config, task, base)
    checked_task = _options(task, config.task.options, "task", base)
    device = plugins.find("device", config.device.use)
    device_options = _options(device, config.device.options, "device", base)
    scheduler = plugins.find("scheduler", config.scheduler.use) if config.scheduler else None
    scheduler_options = (
        _options(scheduler, config.scheduler.options, "scheduler", base) if scheduler and config.scheduler else None
    )
    steps = [
        *(_step(plugins, "transform", use, f"transform.{n}", base) for n, use in enumerate(config.transform)),
        *(_step(plugins, "quantizer", use, f"quantize.{n}", base) for n, use in enumerate(config.quantize)),
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
        origin=Origin(source, loader, _options(loader, config.load.options, "load", base)),
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
    return Origin(source, loader, _options(loader, {}, f"load.parts.{role}", Path()))


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


def _options(offer: Offer, options: Mapping[str, Any], key: str, base: Path) -> BaseModel | None:
    where = f"{key} ({offer.extension.name})"
    return validate_options(offer.extension.options_model(), options, where=where, base=base)


def _step(plugins: Plugins, kind: str, use: Use, key: str, base: Path) -> Step:
    offer = plugins.find(kind, use.use)
    options = _options(offer, use.options, key, base)
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
            yield replace(_step(plugins, "transform", Use(name), f"task ({task.extension.name})", base), brought=True)


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


# -- recipe -> bundle ---------------------------------------------------------------------------------------------


def make_task(recipe: Recipe, compiled: CompiledBundle, scheduler: Callable[[], Scheduler]) -> Task:
    """Build the task; it starts the compilations that it wants, the rest is started for it."""
    context = TaskContext(bundle=compiled, scheduler=scheduler, inputs=recipe.config.input)
    task: Task = recipe.task_extension.create(recipe.task_options, context)
    compiled.start_rest()
    return task


def _versioned(offer: Offer, kind: str, options: BaseModel | None, memo: Any) -> dict[str, Any]:
    """Return the part of a stage's ingredients that says who does it and how; files count by their content."""
    files = {str(path): _content(path, memo) for path in input_files(options)}
    return {
        "stage": kind,
        "use": offer.extension.name,
        "plugin": offer.plugin,
        "version": offer.version,
        "options": _by_content(options.model_dump(mode="json"), files) if options else {},
        "openvino": openvino_version(),
    }


def _by_content(value: Any, files: Mapping[str, str]) -> Any:
    """Return options with each file's path replaced by its digest: a file counts by its content, not its place."""
    if isinstance(value, dict):
        return {key: _by_content(part, files) for key, part in value.items()}
    if isinstance(value, list):
        return [_by_content(part, files) for part in value]
    return files.get(value, value) if isinstance(value, str) else value


def _content(path: Path, memo: Any) -> str:
    source = FileSource(path, memo=memo)
    return source_digest(source) if path.is_dir() else digest_file(path, memo)


def load_ingredients(origin: Origin, cache: Cache) -> dict[str, Any]:
    """Return what a conversion depends on."""
    return {
        **_versioned(origin.loader, "load", origin.options, cache.memo),
        "input": source_digest(origin.source),
    }


def open_bundle(recipe: Recipe, cache: Cache | None, progress: Callable[[Progress], None]) -> ModelBundle:
    """Load, or find the conversion in the cache; then put the parts that come from elsewhere in their places."""
    bundle = open_origin(recipe.origin, cache, progress)
    bundle.protection = recipe.protection
    for role, origin in recipe.parts.items():
        put_part(bundle, role, open_origin(origin, cache, progress), origin.source.name)
    return bundle


def open_origin(origin: Origin, cache: Cache | None, progress: Callable[[Progress], None]) -> ModelBundle:
    """Load one source, or find its conversion in the cache."""
    loader = origin.loader.extension
    assert isinstance(loader, LoaderExtension)

    def make() -> ModelBundle:
        progress(Progress("load", 0, 1, f"{loader.name}: {origin.source.name}"))
        bundle: ModelBundle = loader.create(origin.options).load(origin.source)
        return bundle

    _check_plain(origin)
    sealed = origin.source.protection
    if cache is None or not loader.converts or (sealed and not memory.AVAILABLE):
        return make()
    ingredients = load_ingredients(origin, cache)
    key = key_of(ingredients)

    def write(folder: Path) -> None:
        bundle = make()
        bundle.protection = sealed
        _write_bundle(bundle, folder, key)

    entry, _ = cache.get_or_make(ingredients, write, label=f"{loader.name} {origin.source.name}")
    return _bundle_of(entry, sealed)


def _check_plain(origin: Origin) -> None:
    """Refuse to convert what is encrypted where a loader lays some of it out in files while it converts."""
    loader = origin.loader.extension
    if origin.source.protection and isinstance(loader, LoaderExtension) and loader.converts and not loader.in_memory:
        raise ModelError(
            f"the loader {loader.name!r} converts, and would leave parts of an encrypted model in plain files",
            where=origin.source.name,
            hint="Convert first (ovforge convert), then encrypt the result (ovforge encrypt).",
        )


def _write_bundle(bundle: ModelBundle, folder: Path, key: str) -> None:
    """Write a whole bundle for the cache, one model at a time; encrypted where the bundle is."""
    sealed = bundle.protection
    if sealed is None:
        bundle.write_into(folder)
        return
    for path, data in bundle.small_files().items():
        sealed.write(folder, path, data, key)
    for role in bundle.models:
        _write_role(bundle, role, folder, key)
        bundle.models.release(role)


def put_part(bundle: ModelBundle, role: str, part: ModelBundle, name: str) -> None:
    """Give `bundle` another model for `role`: the one of that role in `part`, or the only one that `part` has."""
    found = role if role in part.models else next(iter(part.models), None)
    if found is None or (found != role and len(part.models) > 1):
        raise ModelError(
            f"it has no {role!r}", where=f"load.parts.{role}: {name}", hint=f"It has: {', '.join(sorted(part.models))}."
        )
    bundle.models.take(role, part.models, found)
    for ours in (bundle.configs, bundle.identity, bundle.location):
        ours.pop(role, None)
    if found in part.configs:
        bundle.configs[role] = part.configs[found]
    if found in part.identity:
        bundle.identity[role] = part.identity[found]
    if found in part.location:
        bundle.location[role] = part.location[found]


def _bundle_of(entry: Entry, sealed: Protection | None) -> ModelBundle:
    """Open an entry that holds a whole bundle; the manifest of a plain one already knows every file's digest."""
    return ModelBundle.open(sealed.open(entry.path, entry.key) if sealed else _EntrySource(entry))


class _EntrySource(FileSource):
    """A cache entry's files, whose digests its manifest holds."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.path, f"cache entry {entry.key[:12]}")
        self._entry = entry

    def files(self) -> Mapping[str, int]:
        return {name: facts["size"] for name, facts in self._entry.files.items()}

    def digest(self, path: str) -> str:
        return str(self._entry.files[path]["sha256"])


Kept = Mapping[str, Collection[str]]
"""Role -> operations that quantizers leave as they are."""

NONE_KEPT: Kept = MappingProxyType({})


def step_ingredients(step: Step, identity: str, recipe: Recipe, memo: Any, keep: Kept = NONE_KEPT) -> dict[str, Any]:
    """Return what a step's result depends on; a quantizer's on what calibrates it, too, where it asks for that."""
    ingredients = {**_versioned(step.offer, step.kind, step.options, memo), "input": identity}
    if recipe.protection:
        ingredients["encrypted"] = recipe.protection.identity
    if isinstance(step.offer.extension, QuantizerExtension):
        need = step.offer.extension.needed(step.options)
        if need != "nothing":
            ingredients["calibration"] = calibration_ingredients(recipe, memo)
        if need == "score":
            ingredients["quality"] = _judged_by(recipe, memo)
    if keep:
        ingredients["keep"] = _kept(recipe, keep)
    return ingredients


def _kept(recipe: Recipe, keep: Kept) -> Any:
    """Return the layers that are kept, for the cache's keys, which are plain: of encrypted models not by name."""
    named = {role: sorted(names) for role, names in sorted(keep.items())}
    return key_of(named) if recipe.protection else named


def calibration_ingredients(recipe: Recipe, memo: Any, table: CalibrationTable | None = None) -> dict[str, Any]:
    """Return what recorded inputs depend on, besides the models."""
    table = table or recipe.config.calibration or CalibrationTable()
    return {
        **_caller(recipe, memo),
        "samples": table.samples,
        "runs": table.runs,
        **recipe.calibration.content(memo),
    }


def _caller(recipe: Recipe, memo: Any) -> dict[str, Any]:
    """Return who calls models: task, scheduler, device."""
    scheduler = recipe.scheduler
    return {
        "task": _versioned(recipe.task, "task", recipe.task_options, memo),
        "scheduler": _versioned(scheduler, "scheduler", recipe.scheduler_options, memo) if scheduler else None,
        "device": _versioned(recipe.device, "device", recipe.device_options, memo),
    }


def _judged_by(recipe: Recipe, memo: Any) -> dict[str, Any]:
    """Return what a score depends on, besides the models."""
    table = recipe.config.quality
    told = {"metric": table.metric, "by": table.by, "samples": table.samples} if table else {}
    after = [_versioned(step.offer, step.kind, step.options, memo) for step in recipe.after]
    return {**_caller(recipe, memo), **told, **recipe.held_out.content(memo), "after": after}


def quality_ingredients(recipe: Recipe, identity: str, memo: Any, trial: Kept | None = None) -> dict[str, Any]:
    """Return what the gate's outcome depends on: the unquantized models, all quantizers, and the whole table.

    A trial's depends on the layers that it keeps, and on no limit.
    """
    table = recipe.config.quality
    assert table is not None
    asked: dict[str, Any] = {"stage": "quality", "limit": table.limit, "on_fail": table.on_fail}
    if trial is not None:
        asked = {"stage": "quality trial", "keep": _kept(recipe, trial)}
    return {
        **asked,
        "input": identity,
        "quantize": [step_ingredients(step, "", recipe, memo) for step in recipe.quantizers],
        "judge": _judged_by(recipe, memo),
        **({"encrypted": recipe.protection.identity} if recipe.protection else {}),
        "openvino": openvino_version(),
    }


def apply_step(
    step: Step,
    bundle: ModelBundle,
    recipe: Recipe,
    cache: Cache | None,
    calibration: Calibration,
    keep: Kept = NONE_KEPT,
) -> Report:
    """Change the bundle by one step, or take the changed models from the cache."""
    strict = recipe.config.strict and not step.brought
    before, sealed = bundle.digest(), bundle.protection
    if cache is None or before is None or (sealed and not memory.AVAILABLE):
        return _apply(step, bundle, strict, calibration, keep)
    ingredients = step_ingredients(step, before, recipe, cache.memo, keep)
    key = key_of(ingredients)

    made: dict[str, Any] = {}

    def write(folder: Path) -> None:
        changed = bundle.copy() if step.light else bundle
        report = _apply(step, changed, strict, calibration, keep)
        made.update({role: changed.models[role] for role in report.roles} if step.light else {})
        for role in () if step.light else report.roles:
            _write_role(changed, role, folder, key)
        if sealed is None:
            write_json(folder / _STAGE_FILE, _delta(changed, report))
        else:
            sealed.write(folder, _STAGE_FILE, json.dumps(_delta(changed, report)).encode(), key)

    entry, _ = cache.get_or_make(ingredients, write, label=f"{step.offer.extension.name}")
    report = _take(entry, step, bundle, made)
    _check_strict(step, report, strict)
    return report


def _write_role(bundle: ModelBundle, role: str, folder: Path, key: str) -> None:
    """Write a role's IR for the cache: encrypted where the bundle is, and then through memory alone."""
    if bundle.protection is None:
        bundle.write_model(role, folder)
        return
    xml = path_of(role)
    files = (xml.as_posix(), xml.with_suffix(".bin").as_posix())
    with memory.memory_folder("storing a model") as plain:
        for file in files:
            plain.place(file)
        bundle.write_model(role, plain.root)
        for file in files:
            with plain.content(file) as data:
                bundle.protection.write(folder, file, data, key)


def _apply(step: Step, bundle: ModelBundle, strict: bool, calibration: Calibration, keep: Kept = NONE_KEPT) -> Report:
    stage = step.offer.extension.create(step.options)
    report: Report = (
        _quantized(step, stage, bundle, calibration, keep) if step.kind == "quantizer" else stage.apply(bundle)
    )
    _check_strict(step, report, strict)
    for role in report.roles:
        bundle.models[role] = bundle.models[role]  # changed in place, it cannot be made again by what made it before
        bundle.identity.pop(role, None)
        bundle.location.pop(role, None)
    return report


def _quantized(step: Step, stage: Any, bundle: ModelBundle, calibration: Calibration, keep: Kept) -> Report:
    """Quantize, and measure what that did."""
    assert isinstance(step.offer.extension, QuantizerExtension)
    before = bundle.copy()
    limited = _Limited(calibration, step.offer.extension.needed(step.options), step.offer.extension.name)
    start = time.perf_counter()
    kept = {role: names for role, names in keep.items() if names}
    report: Report = stage.quantize(bundle, limited, kept) if kept else stage.quantize(bundle, limited)
    report.seconds = time.perf_counter() - start
    for role in report.roles:
        report.sizes[role] = (_constant_bytes(before.models[role]), _constant_bytes(bundle.models[role]))
        before.models.release(role)
    return report


def _constant_bytes(model: Any) -> int:
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")


class _Limited:
    """A calibration that gives what a quantizer said that it needs: its results are cached by that."""

    def __init__(self, calibration: Calibration, need: str, name: str) -> None:
        self._calibration, self._need, self._name = calibration, need, name

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        self._check(self._need != "nothing", "inputs")
        return self._calibration.inputs(role, count)

    def score(self, models: Mapping[str, Any]) -> float:
        self._check(self._need == "score", "score")
        return self._calibration.score(models)

    def _check(self, said: bool, what: str) -> None:
        if not said:
            raise PluginError(
                f"it asks for {what}, and its description says that it needs {self._need}",
                where=self._name,
                hint=f'Its author sets needs="{what}" in the QuantizerExtension.',
            )


def _check_strict(step: Step, report: Report, strict: bool) -> None:
    if strict and report.skipped:
        first = report.skipped[0]
        more = f" and {len(report.skipped) - 1} more" if len(report.skipped) > 1 else ""
        raise ModelError(
            f"{first.item} could not be applied: {first.reason}{more}",
            where=step.offer.extension.name,
            hint="Set strict = false to go on without.",
        )


def _delta(bundle: ModelBundle, report: Report) -> dict[str, Any]:
    return {
        "report": asdict(report),
        "configs": bundle.configs,
        "index": bundle.index,
        "assets": {path: data.decode("latin-1") for path, data in bundle.assets.items()},
        "controls": {name: asdict(control) for name, control in bundle.controls.items()},
        "adapters": bundle.adapters,
    }


def _take(entry: Entry, step: Step, bundle: ModelBundle, made: Mapping[str, Any] | None = None) -> Report:
    """Put a stored step's models and the rest into the bundle; a light step's models are changed when they are read.

    `made` holds those of a light step that was applied just now.
    """
    sealed = bundle.protection
    stored = sealed.open(entry.path, entry.key) if sealed else _EntrySource(entry)
    delta = json.loads(stored.read(_STAGE_FILE))
    said = delta["report"]
    report = report_of(said)
    if step.light:
        change = _LightChange(step, bundle.copy(), made or {})
        for role in report.roles:
            bundle.models.lazy(role, partial(change.model, role))
            bundle.identity[role] = f"{entry.key} {role}"
            bundle.location.pop(role, None)
    else:
        changed = ModelBundle.open(stored)
        for role in report.roles:
            bundle.models.take(role, changed.models, role)
            bundle.identity[role] = f"{entry.key} {role}" if sealed else changed.identity[role]
            bundle.location.pop(role, None)
            if role in changed.location:
                bundle.location[role] = changed.location[role]
    bundle.configs, bundle.index, bundle.adapters = delta["configs"], delta["index"], delta["adapters"]
    bundle.assets = {path: data.encode("latin-1") for path, data in delta["assets"].items()}
    bundle.controls = {
        name: Control(**{**control, "shape": tuple(control["shape"])}) for name, control in delta["controls"].items()
    }
    return report


def report_of(said: Mapping[str, Any]) -> Report:
    """Return a report from its JSON."""
    typed = {
        "roles": tuple(said["roles"]),
        "skipped": [Skipped(**skip) for skip in said["skipped"]],
        "sizes": {role: tuple(sizes) for role, sizes in said.get("sizes", {}).items()},  # none in older entries
    }
    return Report(**{**said, **typed})


class _LightChange:
    """What a light step makes of models, as often as they are asked for; a step applied once serves each role once."""

    def __init__(self, step: Step, original: ModelBundle, made: Mapping[str, Any]) -> None:
        self._step, self._original, self._made = step, original, dict(made)
        self._lock = threading.Lock()

    def model(self, role: str) -> Any:
        """Return the changed ov.Model of a role, for the caller alone."""
        with self._lock:
            if role not in self._made:
                bundle = self._original.copy()
                report = self._step.offer.extension.create(self._step.options).apply(bundle)
                self._made = {changed: bundle.models[changed] for changed in report.roles}
            return self._made.pop(role)


def make_adapter(step: Step, bundle: ModelBundle) -> Adapter | None:
    """Return what a transform leaves to be switched while running; None where that is nothing."""
    extension = step.offer.extension
    if not isinstance(extension, GraphTransformExtension) or extension.adapter is None:
        return None
    adapter: Adapter | None = resolve(extension.adapter)(step.options, bundle)
    return adapter


def make_scheduler(recipe: Recipe, bundle: ModelBundle, plugins: Plugins) -> Scheduler:
    """Return the scheduler of the config, or the one that the model names."""
    model_config = bundle.scheduler_config()
    offer, options = recipe.scheduler, recipe.scheduler_options
    if offer is None:
        offer = _scheduler_of(model_config, plugins)
        options = _options(offer, {}, "scheduler", recipe.base)
    scheduler: Scheduler = offer.extension.create(options, model_config)
    return scheduler


def _scheduler_of(model_config: Mapping[str, Any], plugins: Plugins) -> Offer:
    """Return the scheduler that stands for the class which the model names."""
    wanted = model_config.get("_class_name")
    offers = plugins.all("scheduler")
    for offer in offers:
        if isinstance(offer.extension, SchedulerExtension) and wanted in offer.extension.implements:
            return offer
    names = ", ".join(sorted(offer.extension.name for offer in offers)) or "none"
    raise PluginError(
        f"the model names the scheduler {wanted!r}, and no plugin here has it",
        where="scheduler",
        hint=f'Set scheduler.use to one of: {names}; or use = "diffusers" with class_name = "{wanted}" '
        "(pip install 'ovforge-diffusers[convert]').",
    )


def _roles_of(recipe: Recipe, bundle: ModelBundle) -> list[str]:
    """Return the roles that the task uses. Raises ModelError where one is missing."""
    extension = recipe.task_extension
    bundle.require(*extension.roles)
    return [role for role in (*extension.roles, *extension.optional_roles) if role in bundle.models]


# -- bundle -> prepared bundle --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workshop:
    """What it takes to change a bundle and to run one: on the way, to calibrate and to judge, and at the end."""

    recipe: Recipe
    device_plan: DevicePlan
    roles: Sequence[str]
    cache: Cache | None
    plugins: Plugins
    progress: Callable[[Progress], None] = ignore_progress

    def prepare(self, bundle: ModelBundle) -> tuple[ModelBundle, list[Report], Outcome | None]:
        """Take a loaded bundle through all steps; return it, a report for each step, and what the gate said."""
        recipe = self.recipe
        before = recipe.steps[: len(recipe.steps) - len(recipe.after) - len(recipe.quantizers)]
        reports = [apply_step(step, bundle, recipe, self.cache, _NoCalibration()) for step in before]
        outcome = None
        if recipe.quantizers:
            bundle, quantized, outcome = Quantization(self, bundle).run()
            reports += quantized
        reports += [apply_step(step, bundle, recipe, self.cache, _NoCalibration()) for step in recipe.after]
        return bundle, reports, outcome

    def lower(
        self, reference: ModelBundle, calibration: Calibration, keep: Kept = NONE_KEPT, *, trial: bool = False
    ) -> tuple[ModelBundle, list[Report]]:
        """Return what all quantizers make of a bundle, which stays as it is; a trial is not stored, nor strict."""
        bundle = reference.copy()
        reports: list[Report] = []
        for step in self.recipe.quantizers:
            self.progress(Progress("quantize", len(reports), len(self.recipe.quantizers), step.offer.extension.name))
            if trial:
                reports.append(_apply(step, bundle, False, calibration, keep))
            else:
                reports.append(apply_step(step, bundle, self.recipe, self.cache, calibration, keep))
        self.progress(Progress("quantize", len(reports), len(reports)))
        return bundle, reports

    def finish(self, bundle: ModelBundle) -> ModelBundle:
        """Return what the steps after the quantizers make of a bundle, which stays as it is."""
        copy = bundle.copy()
        for step in self.recipe.after:
            apply_step(step, copy, self.recipe, self.cache, _NoCalibration())
        return copy

    def compile(self, bundle: ModelBundle) -> CompiledBundle:
        """Begin to compile a bundle's models."""
        return CompiledBundle(bundle, self.device_plan, self.roles, self.cache)

    def task(self, compiled: CompiledBundle, inputs: Mapping[str, Any] | None = None) -> Task:
        """Return the task on compiled models; `inputs` hints at the calls to come, by default the config's."""
        recipe = self.recipe
        if inputs is not None:
            recipe = replace(recipe, config=recipe.config.model_copy(update={"input": dict(inputs)}))
        return make_task(recipe, compiled, lambda: make_scheduler(recipe, compiled.source, self.plugins))

    def adapters(self, compiled: CompiledBundle, load: Callable[[Use], Adapter]) -> Adapters:
        """Return the adapters of the config, ready to be switched."""
        adapters = Adapters(compiled.source.adapters, compiled.variables, load)
        for step in self.recipe.steps:
            if (adapter := make_adapter(step, compiled.source)) is not None:
                adapters.add(adapter)
        return adapters

    def calibration_key(self, identity: str | None, table: CalibrationTable) -> dict[str, Any] | None:
        """Return what inputs recorded of these models depend on, for the cache; None where nothing is stored."""
        if self.cache is None or identity is None:
            return None
        sealed = {"encrypted": self.recipe.protection.identity} if self.recipe.protection else {}
        made_of = calibration_ingredients(self.recipe, self.cache.memo, table)
        return {"stage": "calibration", "input": identity, **made_of, **sealed, "openvino": openvino_version()}

    def stored_outcome(self, identity: str | None, trial: Kept | None = None) -> Outcome | None:
        """Return what the gate said of the quantizers on these models, or of a trial that keeps layers, where known."""
        if self.cache is None or identity is None:
            return None
        return _stored(
            self.cache.get(quality_ingredients(self.recipe, identity, self.cache.memo, trial)), self.recipe.protection
        )

    def store_outcome(self, identity: str | None, outcome: Outcome, trial: Kept | None = None) -> None:
        """Remember what the gate said, in the end or of a trial: a search that is interrupted goes on."""
        if self.cache is not None and identity is not None:
            ingredients = quality_ingredients(self.recipe, identity, self.cache.memo, trial)
            sealed, said, key = self.recipe.protection, asdict(outcome), key_of(ingredients)

            def write(folder: Path) -> None:
                if sealed is None:
                    write_json(folder / _STAGE_FILE, said)
                else:
                    sealed.write(folder, _STAGE_FILE, json.dumps(said).encode(), key)

            self.cache.put(ingredients, write, label=f"quality: {outcome}" if trial is None else "trial of a search")


def _stored(entry: Entry | None, sealed: Protection | None) -> Outcome | None:
    if entry is None:
        return None
    stored = sealed.open(entry.path, entry.key) if sealed else _EntrySource(entry)
    return outcome_of(json.loads(stored.read(_STAGE_FILE)))


class _NoCalibration:
    """What a transform's step is given: it asks for nothing."""

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        raise AssertionError("only quantizers are calibrated")

    def score(self, models: Mapping[str, Any]) -> float:
        raise AssertionError("only quantizers are calibrated")


# -- the pipeline --------------------------------------------------------------------------------------------------


class Pipeline:
    """A model that is loaded, changed, compiled and ready: call it.

        pipe = Pipeline("text-to-image", source="models/lcm", scheduler="lcm")
        result = pipe("a beautiful pink unicorn, 8k", steps=4, seed=1234567)

    `transforms`, `quantize`, `scheduler` and `device` take names or `Use(...)`; options of `task` and `load` are
    given as `Use("text-to-image", ...)` and `load={...}`. `cache=None` keeps nothing on disk.
    """

    def __init__(
        self,
        task: str | Use | PipelineConfig,
        source: str | Path | None = None,
        *,
        load: Mapping[str, Any] | None = None,
        transforms: Sequence[str | Use] = (),
        quantize: Sequence[str | Use] = (),
        calibration: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
        scheduler: str | Use | None = None,
        device: str | Use = "cpu",
        input: Mapping[str, Any] | None = None,
        optimize: bool = True,
        strict: bool = True,
        base: Path | None = None,
        plugins: Plugins | None = None,
        cache: Cache | str | None = "default",
        progress: Callable[[Progress], None] = ignore_progress,
    ) -> None:
        if isinstance(task, PipelineConfig):
            config = task
        else:
            config = PipelineConfig.of(
                {
                    "task": task,
                    "load": {**(load or {}), **({"source": source} if source is not None else {})},
                    "transform": tuple(transforms),
                    "quantize": tuple(quantize),
                    "calibration": calibration,
                    "quality": quality,
                    "scheduler": scheduler,
                    "device": device,
                    "input": dict(input or {}),
                    "optimize": optimize,
                    "strict": strict,
                },
                where="Pipeline",
            )
        self.config = config
        self.timings = Timings()
        self._plugins = plugins or Plugins()
        self._cache = _chosen(cache)
        with self.timings.span("load"):
            self.recipe = make_recipe(config, base or Path.cwd(), self._plugins, self._cache)
            self.device_plan: DevicePlan = self.recipe.device.extension.create(self.recipe.device_options).plan()
            self.bundle = open_bundle(self.recipe, self._cache, progress)
            self._roles = _roles_of(self.recipe, self.bundle)
            self._workshop = Workshop(self.recipe, self.device_plan, self._roles, self._cache, self._plugins, progress)
            self.bundle, self.reports, self.quality = self._workshop.prepare(self.bundle)
        self._compile_start = time.perf_counter()
        self.compiled = self._workshop.compile(self.bundle)
        self.controls = Controls(self.bundle.controls, self.compiled.variables)
        self.adapters = self._workshop.adapters(self.compiled, self._load_adapter)
        self.task = self._workshop.task(self.compiled)
        self._at_start = len(self.compiled.wanted)

    def __call__(
        self, *arguments: Any, progress: Callable[[Progress], None] = ignore_progress, **inputs: Any
    ) -> Result:
        """Run once. One positional argument is the task's first input; others go by name.

        What is not given comes from the config's [input], then from the task's defaults. Raises ConfigError for an
        unknown or wrong input.
        """
        model = self.recipe.task_extension.inputs_model()
        if len(arguments) > 1:
            raise ConfigError(
                f"{len(arguments)} positional inputs", where="call", hint="Give all but the first by name."
            )
        first = dict(zip(model.model_fields, arguments, strict=False))
        given = checked(model, {**self.config.input, **first, **inputs}, where="input", base=self.recipe.base)
        result = self.task(given, progress)
        result.timings = self.start_timings().merged(result.timings)
        result.provenance = {**self.provenance(), **result.provenance}
        return result

    def _load_adapter(self, use: Use) -> Adapter:
        """Return an adapter that a running pipeline is to take in. Raises ModelError where a part finds no place."""
        step = _step(self._plugins, "transform", use, "adapters.load", self.recipe.base)
        adapter = make_adapter(step, self.bundle)
        if adapter is None:
            raise ConfigError(
                "it is no adapter that can be loaded into a running pipeline",
                where=f"adapters.load: {use.use}",
                hint="Add it to the config as a transform.",
            )
        _check_strict(step, Report(skipped=list(adapter.skipped)), self.config.strict)
        return adapter

    def start_timings(self) -> Timings:
        """Return what it took to get ready: load, then compile, and each role's part of it; waits for compilation."""
        timings = Timings().merged(self.timings)
        models = self.compiled.all()
        finished = [model.finished for _, model in models[: self._at_start]]
        timings.add("compile", max(finished, default=self._compile_start) - self._compile_start)
        for role, model in models:
            timings.add(f"compile.{role}", model.seconds)
        return timings

    def provenance(self) -> dict[str, Any]:
        """Return what a result depends on, JSON-able, without inputs."""
        precisions = {role: model.precision for role, model in self.compiled.all()}
        offers = [self.recipe.origin.loader, self.recipe.task, self.recipe.device]
        offers += [step.offer for step in self.recipe.steps] + [part.loader for part in self.recipe.parts.values()]
        offers += [self.recipe.scheduler] if self.recipe.scheduler else []
        # Relative paths start at the config's folder; a config without paths says nothing of this machine.
        sources = [self.config.load.source, *self.config.load.parts.values()]
        has_paths = (
            any(input_files(step.options) for step in self.recipe.steps)
            or bool(self.config.calibration and self.config.calibration.file)
            or bool(self.config.quality and self.config.quality.file)
            or bool(self.adapters.loaded)
            or not all(source.startswith(PACKAGE) for source in sources)
        )
        return {
            **({"base": str(self.recipe.base.resolve())} if has_paths else {}),
            "config": {key: value for key, value in self.config.as_dict().items() if key not in ("input", "output")},
            "versions": {
                "ovforge": ovforge.__version__,
                "openvino": openvino_version(),
                **{offer.plugin: offer.version for offer in offers if offer.plugin != "builtin"},
            },
            "digests": {role: self.bundle.identity.get(role) for role in self._roles},
            "device": {"name": self.device_plan.device, "full_name": self.device_plan.full_name},
            "precision": {role: kind for role, kind in precisions.items() if not role.startswith("tokenizer")},
            **({"controls": changed} if (changed := self.controls.changed()) else {}),
            **({"adapters": self._adapters_now()} if self.adapters else {}),
        }

    def _adapters_now(self) -> dict[str, Any]:
        """Return the weight of each adapter, and of those that were loaded later where they came from."""
        memo = self._cache.memo if self._cache else None
        now: dict[str, Any] = {name: {"weight": weight} for name, weight in self.adapters.items()}
        for name, use in self.adapters.loaded.items():
            options = _step(self._plugins, "transform", use, "adapters.load", self.recipe.base).options
            files = [_content(path, memo) for path in input_files(options)]
            now[name] |= {"use": use.model_dump(mode="json"), "digests": files}
        return now

    def adjust(self, provenance: Mapping[str, Any]) -> None:
        """Set controls and adapters to what a result's provenance says of them."""
        for name, value in provenance.get("controls", {}).items():
            self.controls[name] = value
        adapters = provenance.get("adapters", {})
        for entry in adapters.values():
            if "use" in entry:
                self.adapters.load(Use(**entry["use"]))
        if adapters:
            self.adapters.set({name: entry["weight"] for name, entry in adapters.items()})


# -- entry points ---------------------------------------------------------------------------------------------------


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


def load(
    config: str | Path | Mapping[str, Any] | PipelineConfig,
    *,
    overrides: Iterable[str] = (),
    plugins: Plugins | None = None,
    cache: Cache | str | None = "default",
    progress: Callable[[Progress], None] = ignore_progress,
) -> Pipeline:
    """Return the pipeline of a config file (.toml, .json), a dict, a PipelineConfig, or a picture that ovforge made."""
    checked_config, base = read_pipeline(config, overrides)
    pipeline = Pipeline(checked_config, base=base, plugins=plugins, cache=cache, progress=progress)
    if isinstance(config, str | Path) and Path(config).suffix.lower() == ".png":
        provenance = read_provenance(Path(config))
        pipeline.adjust(provenance)
        _compare(provenance, pipeline)
    return pipeline


def _compare(then: Mapping[str, Any], pipeline: Pipeline) -> None:
    """Warn where a picture was made with something else than what is here now."""
    now = pipeline.provenance()
    for part in ("digests", "versions", "precision", "device", "adapters"):
        if part in then and then[part] != now.get(part, {}):
            ours = now.get(part, {})
            changed = [key for key in {**then[part], **ours} if then[part].get(key) != ours.get(key)]
            warnings.warn(
                f"the picture was made with other {part} ({', '.join(sorted(changed))}): it may differ", stacklevel=3
            )


def plan(
    config: str | Path | Mapping[str, Any] | PipelineConfig,
    *,
    overrides: Iterable[str] = (),
    plugins: Plugins | None = None,
    cache: Cache | str | None = "default",
) -> Plan:
    """Return what a pipeline would do, changing nothing: no conversion, no compilation, no entry.

    Only digests of files are remembered, so that a large model is not read twice to be planned.
    """
    checked_config, base = read_pipeline(config, overrides)
    store = _chosen(cache)
    recipe = make_recipe(checked_config, base, plugins or Plugins(), store)
    with tempfile.TemporaryDirectory() as scratch:
        # Without a cache everything is to do: an empty one says so.
        return Plan(tuple(_planned(recipe, store or Cache(Path(scratch)))), recipe.config.as_dict())


@dataclass(frozen=True)
class Prepared:
    """A bundle after all steps, with what they did: all of a pipeline but its compiled models."""

    bundle: ModelBundle
    steps: Sequence[Step]
    reports: Sequence[Report]
    quality: Outcome | None = None

    @property
    def quantized(self) -> list[Report]:
        """The quantizers' reports."""
        pairs = zip(self.steps, self.reports, strict=True)
        return [report for step, report in pairs if step.kind == "quantizer"]


def prepare(
    config: Mapping[str, Any],
    *,
    base: Path,
    plugins: Plugins,
    cache: Cache | str | None = "default",
    progress: Callable[[Progress], None] = ignore_progress,
) -> Prepared:
    """Take a pipeline's models through all steps, and stop before it is compiled."""
    store = _chosen(cache)
    recipe = make_recipe(PipelineConfig.of(config), base, plugins, store)
    device_plan: DevicePlan = recipe.device.extension.create(recipe.device_options).plan()
    bundle = open_bundle(recipe, store, progress)
    workshop = Workshop(recipe, device_plan, _roles_of(recipe, bundle), store, plugins, progress)
    prepared, reports, outcome = workshop.prepare(bundle)
    return Prepared(prepared, recipe.steps, reports, outcome)


def prepare_alone(
    config: Mapping[str, Any], base: Path, plugins: Plugins, progress: Callable[[Progress], None] = ignore_progress
) -> Prepared:
    """Quantize a model that no task here runs: by quantizers that need no data, without the cache."""
    source = open_source(str(config["load"]), base=base, plugins=plugins)
    loader = find_loader(source, None, plugins)
    bundle = open_origin(Origin(source, loader, _options(loader, {}, "load", base)), None, progress)
    bundle.protection = source.protection
    uses = [use if isinstance(use, Use) else Use.model_validate(use) for use in config["quantize"]]
    steps = [_step(plugins, "quantizer", use, f"quantize.{n}", base) for n, use in enumerate(uses)]
    return Prepared(bundle, steps, [_apply(step, bundle, False, _NoTask()) for step in steps])


def task_for(source: str, base: Path, plugins: Plugins, cache: Cache | str | None = "default") -> str | None:
    """Return the first task that has all its roles in a model; None where none has."""
    opened = open_source(source, base=base, plugins=plugins)
    loader = find_loader(opened, None, plugins)
    origin = Origin(opened, loader, _options(loader, {}, "load", base))
    roles = set(open_origin(origin, _chosen(cache), ignore_progress).models)
    for offer in plugins.all("task"):
        if isinstance(offer.extension, TaskExtension) and roles.issuperset(offer.extension.roles):
            return offer.extension.name
    return None


class _NoTask:
    """What a quantizer is given where nothing can run its models."""

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        raise ConfigError(
            "it needs to see inputs of models, and no task here runs this one",
            where="calibration",
            hint="Name the task with --task, or take a quantizer that needs no data, as nncf-weights.",
        )

    def score(self, models: Mapping[str, Any]) -> float:
        self.inputs("", 0)
        raise AssertionError


def _chosen(cache: Cache | str | None) -> Cache | None:
    """Return the cache that an argument means: "default" is the user's, None is none."""
    if isinstance(cache, str):
        if cache != "default":
            raise ConfigError(f"{cache!r} is no cache", where="cache", hint='Give a Cache, None, or "default".')
        return Cache.default()
    return cache


def _planned(recipe: Recipe, cache: Cache) -> Iterable[PlannedStage]:
    stage, bundle = _planned_load("load", recipe.origin, cache)
    if bundle is not None:
        bundle.protection = recipe.protection
    yield stage
    for role, origin in recipe.parts.items():
        stage, part = _planned_load(f"load {role}", origin, cache)
        yield stage
        if bundle is None or part is None:
            bundle = None
        else:
            put_part(bundle, role, part, origin.source.name)
    gate: PlannedStage | None = None
    kept = NONE_KEPT
    for step in recipe.steps:
        name = f"{step.kind} ({step.phase.name.lower()})"
        if recipe.config.quality is not None and step == recipe.quantizers[0]:
            gate, kept = _planned_gate(recipe, bundle, cache)
        if gate is not None and step.kind != "quantizer":
            yield gate
            gate = None
        digest = bundle.digest() if bundle else None
        if bundle is None or digest is None:
            yield _stage(name, step.offer, "to do", "after the stage before it")
            continue
        ingredients = step_ingredients(step, digest, recipe, cache.memo, kept if step.kind == "quantizer" else {})
        entry = cache.peek(ingredients)
        if entry is None:
            yield _stage(name, step.offer, "to do", cache.explain(ingredients).reason)
            bundle = None
        else:
            _take(entry, step, bundle)
            yield _stage(name, step.offer, "cached", size=entry.size)
    if gate is not None:
        yield gate
    device = recipe.device.extension.create(recipe.device_options).plan()
    task = recipe.task_extension
    if bundle is None:
        for role in task.roles:
            yield _stage(f"compile {role}", recipe.device, "to do", "after the stage before it")
    else:
        compiled = CompiledBundle(bundle, device, _roles_of(recipe, bundle), cache, execute=False)
        make_task(recipe, compiled, _no_scheduler)
        for role, shapes in compiled.wanted:
            yield _planned_compilation(role, shapes, bundle, device, recipe.device, cache)
    if recipe.scheduler:
        yield _stage("scheduler", recipe.scheduler, "direct")
    yield _stage("task", recipe.task, "direct")


def _planned_gate(recipe: Recipe, bundle: ModelBundle | None, cache: Cache) -> tuple[PlannedStage, Kept]:
    """Return what the gate would do with unquantized models, and the layers that it keeps where that is known."""
    table = recipe.config.quality
    assert table is not None
    planned = partial(PlannedStage, "quality", table.metric or "quality", "builtin", ovforge.__version__)
    identity = bundle.digest() if bundle else None
    if identity is None:
        return planned("to do", "after the stage before it"), {}
    ingredients = quality_ingredients(recipe, identity, cache.memo)
    entry = cache.peek(ingredients)
    if entry is None or (outcome := _stored(entry, recipe.protection)) is None:
        return planned("to do", cache.explain(ingredients).reason), {}
    return planned("cached", str(outcome), entry.size), outcome.kept


def _planned_load(name: str, origin: Origin, cache: Cache) -> tuple[PlannedStage, ModelBundle | None]:
    """Return what loading a source would do, and its bundle where that is there without work."""
    loader = origin.loader.extension
    assert isinstance(loader, LoaderExtension)
    size = sum(origin.source.files().values())
    _check_plain(origin)
    if not loader.converts:
        bundle: ModelBundle = loader.create(origin.options).load(origin.source)
        return _stage(name, origin.loader, "direct", "opened where it lies", size), bundle
    ingredients = load_ingredients(origin, cache)
    entry = cache.peek(ingredients)
    if entry is None:
        return _stage(name, origin.loader, "to do", cache.explain(ingredients).reason, size), None
    return _stage(name, origin.loader, "cached", size=entry.size), _bundle_of(entry, origin.source.protection)


def _no_scheduler() -> Scheduler:
    raise AssertionError("a task makes its scheduler when it is called")


def _planned_compilation(
    role: str, shapes: Shapes | None, bundle: ModelBundle, device: DevicePlan, offer: Offer, cache: Cache
) -> PlannedStage:
    stage = f"compile {role}"
    identity = bundle.identity.get(role)
    if identity is None or not device.can_export:
        return _stage(stage, offer, "to do", "this device's compiled models cannot be stored" * (not device.can_export))
    ingredients = compile_ingredients(role, identity, device, shapes, bundle.protection)
    entry = cache.peek(ingredients)
    if entry is None:
        return _stage(stage, offer, "to do", cache.explain(ingredients).reason)
    return _stage(stage, offer, "cached", size=entry.size)


def _stage(stage: str, offer: Offer, state: str, why: str = "", size: int | None = None) -> PlannedStage:
    return PlannedStage(stage, offer.extension.name, offer.plugin, offer.version, state, why, size)
