"""What it takes to change a bundle and to run one: on the way, to calibrate and to judge, and at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ovforge.config.pipeline import CalibrationTable, Use
from ovforge.contracts.extensions import GraphTransformExtension, SchedulerExtension, resolve
from ovforge.contracts.stages import (
    Adapter,
    Calibration,
    DevicePlan,
    Progress,
    Report,
    Scheduler,
    Task,
    TaskContext,
    ignore_progress,
)
from ovforge.errors import PluginError
from ovforge.model.bundle import ModelBundle, write_json
from ovforge.model.runtime import openvino_version
from ovforge.model.sources import Protection
from ovforge.plugins.manager import Offer, Plugins
from ovforge.run.adapters import Adapters
from ovforge.run.compiled import CompiledBundle
from ovforge.run.ingredients import NONE_KEPT, Kept, calibration_ingredients, quality_ingredients
from ovforge.run.loading import EntrySource
from ovforge.run.quality import Outcome, outcome_of
from ovforge.run.quantization import Quantization
from ovforge.run.recipe import Recipe, Step, options_of
from ovforge.run.steps import STAGE_FILE, apply_now, apply_step
from ovforge.store.cache import Cache, Entry, key_of

__all__ = ["Workshop", "make_adapter", "make_scheduler", "make_task", "outcome_in", "roles_of"]


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
                reports.append(apply_now(step, bundle, False, calibration, keep))
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
        return outcome_in(
            self.cache.get(quality_ingredients(self.recipe, identity, self.cache.memo, trial)), self.recipe.protection
        )

    def store_outcome(self, identity: str | None, outcome: Outcome, trial: Kept | None = None) -> None:
        """Remember what the gate said, in the end or of a trial: a search that is interrupted goes on."""
        if self.cache is not None and identity is not None:
            ingredients = quality_ingredients(self.recipe, identity, self.cache.memo, trial)
            sealed, said, key = self.recipe.protection, asdict(outcome), key_of(ingredients)

            def write(folder: Path) -> None:
                if sealed is None:
                    write_json(folder / STAGE_FILE, said)
                else:
                    sealed.write(folder, STAGE_FILE, json.dumps(said).encode(), key)

            self.cache.put(ingredients, write, label=f"quality: {outcome}" if trial is None else "trial of a search")


def make_task(recipe: Recipe, compiled: CompiledBundle, scheduler: Callable[[], Scheduler]) -> Task:
    """Build the task; it starts the compilations that it wants, the rest is started for it."""
    context = TaskContext(bundle=compiled, scheduler=scheduler, inputs=recipe.config.input)
    task: Task = recipe.task_extension.create(recipe.task_options, context)
    compiled.start_rest()
    return task


def make_scheduler(recipe: Recipe, bundle: ModelBundle, plugins: Plugins) -> Scheduler:
    """Return the scheduler of the config, or the one that the model names."""
    model_config = bundle.scheduler_config()
    offer, options = recipe.scheduler, recipe.scheduler_options
    if offer is None:
        offer = _scheduler_of(model_config, plugins)
        options = options_of(offer, {}, "scheduler", recipe.base)
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


def make_adapter(step: Step, bundle: ModelBundle) -> Adapter | None:
    """Return what a transform leaves to be switched while running; None where that is nothing."""
    extension = step.offer.extension
    if not isinstance(extension, GraphTransformExtension) or extension.adapter is None:
        return None
    adapter: Adapter | None = resolve(extension.adapter)(step.options, bundle)
    return adapter


def roles_of(recipe: Recipe, bundle: ModelBundle) -> list[str]:
    """Return the roles that the task uses. Raises ModelError where one is missing."""
    extension = recipe.task_extension
    bundle.require(*extension.roles)
    return [role for role in (*extension.roles, *extension.optional_roles) if role in bundle.models]


def outcome_in(entry: Entry | None, sealed: Protection | None) -> Outcome | None:
    if entry is None:
        return None
    stored = sealed.open(entry.path, entry.key) if sealed else EntrySource(entry)
    return outcome_of(json.loads(stored.read(STAGE_FILE)))


class _NoCalibration:
    """What a transform's step is given: it asks for nothing."""

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        raise AssertionError("only quantizers are calibrated")

    def score(self, models: Mapping[str, Any]) -> float:
        raise AssertionError("only quantizers are calibrated")
