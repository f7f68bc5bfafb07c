"""A pipeline's models after all steps, without compiling them: for commands that write or show models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovforge.config.pipeline import PipelineConfig, Use
from ovforge.contracts.extensions import TaskExtension
from ovforge.contracts.stages import DevicePlan, Progress, Report, ignore_progress
from ovforge.errors import ConfigError
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Plugins
from ovforge.run.loading import open_bundle, open_origin
from ovforge.run.opening import open_source
from ovforge.run.quality import Outcome
from ovforge.run.recipe import Origin, Step, find_loader, make_recipe, make_step, options_of
from ovforge.run.steps import apply_now
from ovforge.run.workshop import Workshop, roles_of
from ovforge.store.cache import Cache, chosen_cache

__all__ = ["Prepared", "prepare", "prepare_alone", "task_for"]


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
    store = chosen_cache(cache)
    recipe = make_recipe(PipelineConfig.of(config), base, plugins, store)
    device_plan: DevicePlan = recipe.device.extension.create(recipe.device_options).plan()
    bundle = open_bundle(recipe, store, progress)
    workshop = Workshop(recipe, device_plan, roles_of(recipe, bundle), store, plugins, progress)
    prepared, reports, outcome = workshop.prepare(bundle)
    return Prepared(prepared, recipe.steps, reports, outcome)


def prepare_alone(
    config: Mapping[str, Any], base: Path, plugins: Plugins, progress: Callable[[Progress], None] = ignore_progress
) -> Prepared:
    """Quantize a model that no task here runs: by quantizers that need no data, without the cache."""
    source = open_source(str(config["load"]), base=base, plugins=plugins)
    loader = find_loader(source, None, plugins)
    bundle = open_origin(Origin(source, loader, options_of(loader, {}, "load", base)), None, progress)
    bundle.protection = source.protection
    uses = [use if isinstance(use, Use) else Use.model_validate(use) for use in config["quantize"]]
    steps = [make_step(plugins, "quantizer", use, f"quantize.{n}", base) for n, use in enumerate(uses)]
    return Prepared(bundle, steps, [apply_now(step, bundle, False, _NoTask()) for step in steps])


def task_for(source: str, base: Path, plugins: Plugins, cache: Cache | str | None = "default") -> str | None:
    """Return the first task that has all its roles in a model; None where none has."""
    opened = open_source(source, base=base, plugins=plugins)
    loader = find_loader(opened, None, plugins)
    origin = Origin(opened, loader, options_of(loader, {}, "load", base))
    roles = set(open_origin(origin, chosen_cache(cache), ignore_progress).models)
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
