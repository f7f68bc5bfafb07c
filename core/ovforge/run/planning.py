"""What a pipeline would do: its stages, by whom, and whether they are in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ovforge._version import __version__
from ovforge.config.pipeline import PipelineConfig
from ovforge.contracts.extensions import LoaderExtension
from ovforge.contracts.stages import DevicePlan, Scheduler
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Offer, Plugins
from ovforge.run.compiled import CompiledBundle, Shapes, can_store, compile_ingredients
from ovforge.run.ingredients import NONE_KEPT, Kept, load_ingredients, quality_ingredients, step_ingredients
from ovforge.run.loading import bundle_of, check_plain, put_part
from ovforge.run.recipe import Origin, Recipe, make_recipe, read_pipeline
from ovforge.run.steps import take_step
from ovforge.run.workshop import make_task, outcome_in, roles_of
from ovforge.store.cache import Cache, chosen_cache

__all__ = ["Plan", "PlannedStage", "plan"]


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
    store = chosen_cache(cache)
    recipe = make_recipe(checked_config, base, plugins or Plugins(), store)
    with tempfile.TemporaryDirectory() as scratch:
        # Without a cache everything is to do: an empty one says so.
        return Plan(tuple(_planned(recipe, store or Cache(Path(scratch)))), recipe.config.as_dict())


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
            take_step(entry, step, bundle)
            yield _stage(name, step.offer, "cached", size=entry.size)
    if gate is not None:
        yield gate
    device = recipe.device.extension.create(recipe.device_options).plan()
    task = recipe.task_extension
    if bundle is None:
        for role in task.roles:
            yield _stage(f"compile {role}", recipe.device, "to do", "after the stage before it")
    else:
        compiled = CompiledBundle(bundle, device, roles_of(recipe, bundle), cache, execute=False)
        make_task(recipe, compiled, _no_scheduler)
        for role, shapes in compiled.wanted:
            yield _planned_compilation(role, shapes, bundle, device, recipe.device, cache)
    if recipe.scheduler:
        yield _stage("scheduler", recipe.scheduler, "direct")
    yield _stage("task", recipe.task, "direct")


def _planned_load(name: str, origin: Origin, cache: Cache) -> tuple[PlannedStage, ModelBundle | None]:
    """Return what loading a source would do, and its bundle where that is there without work."""
    loader = origin.loader.extension
    assert isinstance(loader, LoaderExtension)
    size = sum(origin.source.files().values())
    check_plain(origin)
    if not loader.converts:
        bundle: ModelBundle = loader.create(origin.options).load(origin.source)
        return _stage(name, origin.loader, "direct", "opened where it lies", size), bundle
    ingredients = load_ingredients(origin, cache)
    entry = cache.peek(ingredients)
    if entry is None:
        return _stage(name, origin.loader, "to do", cache.explain(ingredients).reason, size), None
    return _stage(name, origin.loader, "cached", size=entry.size), bundle_of(entry, origin.source.protection)


def _planned_gate(recipe: Recipe, bundle: ModelBundle | None, cache: Cache) -> tuple[PlannedStage, Kept]:
    """Return what the gate would do with unquantized models, and the layers that it keeps where that is known."""
    table = recipe.config.quality
    assert table is not None
    planned = partial(PlannedStage, "quality", table.metric or "quality", "builtin", __version__)
    identity = bundle.digest() if bundle else None
    if identity is None:
        return planned("to do", "after the stage before it"), {}
    ingredients = quality_ingredients(recipe, identity, cache.memo)
    entry = cache.peek(ingredients)
    if entry is None or (outcome := outcome_in(entry, recipe.protection)) is None:
        return planned("to do", cache.explain(ingredients).reason), {}
    return planned("cached", str(outcome), entry.size), outcome.kept


def _planned_compilation(
    role: str, shapes: Shapes | None, bundle: ModelBundle, device: DevicePlan, offer: Offer, cache: Cache
) -> PlannedStage:
    stage = f"compile {role}"
    identity = bundle.identity.get(role)
    if identity is None:
        return _stage(stage, offer, "to do")
    if not can_store(bundle, role, device):
        what = "models with adapters" if device.can_export else "this device's models"
        return _stage(stage, offer, "to do", f"{what} cannot be stored when compiled")
    ingredients = compile_ingredients(role, identity, device, shapes, bundle.protection)
    entry = cache.peek(ingredients)
    if entry is None:
        return _stage(stage, offer, "to do", cache.explain(ingredients).reason)
    return _stage(stage, offer, "cached", size=entry.size)


def _no_scheduler() -> Scheduler:
    raise AssertionError("a task makes its scheduler when it is called")


def _stage(stage: str, offer: Offer, state: str, why: str = "", size: int | None = None) -> PlannedStage:
    return PlannedStage(stage, offer.extension.name, offer.plugin, offer.version, state, why, size)
