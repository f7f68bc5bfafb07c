"""What a pipeline would do: its stages, by whom, and whether they are in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ovforge.config.pipeline import PipelineConfig
from ovforge.contracts.stages import DevicePlan, Notes, ignore_progress
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Offer, Plugins
from ovforge.run.compiled import CompiledBundle, Shapes, can_store, compile_dependencies
from ovforge.run.notices import warnings_of
from ovforge.run.quantizing import NO_CALIBRATION, Run
from ovforge.run.resolution import ResolvedPipeline, Step, read_pipeline, resolve
from ovforge.run.session import Session
from ovforge.run.stages import LoadStage, Stage, StepStage
from ovforge.run.tasks import make_task, plan_device, require_task, roles_of
from ovforge.run.walk import walk
from ovforge.store.cache import Cache, DamagedError, chosen_cache

__all__ = ["Plan", "PlannedStage", "plan"]

_LATER = "after the stage before it"


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan. `state` is "cached", "to do", or "direct" if there is nothing to store."""

    stage: str
    use: str
    plugin: str
    version: str
    state: str
    why: str = ""
    size: int | None = None
    warnings: tuple[str, ...] = ()
    """What a step that is stored did not apply, and its notes."""


@dataclass(frozen=True)
class Plan:
    """What a pipeline would do."""

    stages: tuple[PlannedStage, ...]
    config: dict[str, Any] = field(default_factory=dict)


def plan(
    config: str | Path | Mapping[str, Any] | PipelineConfig,
    *,
    overrides: Sequence[str] = (),
    plugins: Plugins | None = None,
    cache: Cache | str | None = "default",
) -> Plan:
    """Return what a pipeline would do, changing nothing: no conversion, no compilation, no entry, no command for a key.

    Only digests of files are remembered, so that a large model is not read twice to be planned. Raises what a run
    would raise before its first long piece of work.
    """
    checked_config, base = read_pipeline(config, overrides)
    require_task(checked_config)
    store = chosen_cache(cache)
    session = Session.of(checked_config, base, plugins, store, planning=True)
    pipeline = resolve(checked_config, base, session)
    with tempfile.TemporaryDirectory() as scratch:
        # Without a cache everything is to do: an empty one says so.
        planner = _Planner(pipeline, store or Cache(Path(scratch)))
        planner.compile(walk(pipeline, planner, ignore_progress))
        return Plan(tuple(planner.stages), checked_config.as_dict())


class _Planner:
    """Sees for each stage whether it is stored, and takes what is; everything behind the first that is not is to do."""

    def __init__(self, pipeline: ResolvedPipeline, cache: Cache) -> None:
        self.stages: list[PlannedStage] = []
        self._pipeline, self._cache = pipeline, cache
        self._device = plan_device(pipeline)

    def load(self, name: str, stage: LoadStage) -> ModelBundle | None:
        """Open a source if that needs no conversion, or if it is stored."""
        resolved = stage.resolved
        if resolved.loader is None:
            self.stages.append(PlannedStage(name, "?", "?", "", "to do", resolved.closed or ""))
            return None
        stage.check()
        offer, size = resolved.loader.offer, sum(resolved.source.files().values())
        if not resolved.loader.extension.converts:
            self._add(name, offer, "direct", "opened where it lies", size)
            return stage.make()
        return self._look(name, offer, stage, size)

    def step(self, step: Step, bundle: ModelBundle | None) -> ModelBundle | None:
        """Take a step's result if it is stored."""
        return self._step(step, bundle, {})

    def quantize(self, bundle: ModelBundle | None) -> ModelBundle | None:
        """Take the quantizers' results if they are stored, with the layers that the driver keeps."""
        pipeline = self._pipeline
        outcome = None
        if pipeline.driver is not None and bundle is not None:
            outcome = pipeline.driver.known(Run(pipeline, bundle, self._device, self._cache, ignore_progress))
        for step in pipeline.quantizers:
            bundle = self._step(step, bundle, outcome.kept if outcome else {})
        if pipeline.driven_by is not None and pipeline.driver is not None and pipeline.driver.judges:
            state, why = ("cached", str(outcome)) if outcome else ("to do", _LATER)
            self._add(pipeline.driven_by.extension.name, pipeline.driven_by, state, why)
        return bundle

    def compile(self, bundle: ModelBundle | None) -> None:
        """See which compiled models the task asks for, and whether they are stored."""
        pipeline = self._pipeline
        task, device = pipeline.task, pipeline.device.offer
        assert task is not None
        notes: Iterable[str] = ()
        if bundle is None:
            either = " or ".join(task.extension.one_of)
            for role in (*([either] if either else []), *task.extension.roles):
                self._add(f"compile {role}", device, "to do", _LATER)
        else:
            compiled = CompiledBundle(bundle, self._device, roles_of(pipeline, bundle), self._cache, execute=False)
            made = make_task(pipeline, compiled)
            notes = made.notes() if isinstance(made, Notes) else ()
            for role, shapes in compiled.wanted:
                self._compilation(role, shapes, bundle, self._device, device)
        if pipeline.scheduler:
            self._add("scheduler", pipeline.scheduler.offer, "direct")
        self._add("task", task.offer, "direct", "; ".join(notes))

    def _step(self, step: Step, bundle: ModelBundle | None, keep: Any) -> ModelBundle | None:
        name, offer = f"{step.kind} ({step.phase.name.lower()})", step.chosen.offer
        if bundle is None:
            self._add(name, offer, "to do", _LATER)
            return None
        stage = StepStage(step, bundle, self._pipeline, NO_CALIBRATION, keep)
        taken = self._look(name, offer, stage)
        self.stages[-1] = replace(self.stages[-1], warnings=tuple(warnings_of([step], [stage.report])))
        return taken

    def _look(self, name: str, offer: Offer, stage: Stage, size: int | None = None) -> ModelBundle | None:
        dependencies = stage.dependencies
        if dependencies is None:
            self._add(name, offer, "to do", "nothing of it can be stored", size)
            return None
        entry = self._cache.peek(dependencies)
        if entry is None:
            self._add(name, offer, "to do", self._cache.explain(dependencies).reason, size)
            return None
        try:
            bundle = stage.take(entry)
        except DamagedError as damage:
            self._add(name, offer, "to do", f"damaged: {damage.what}", size)
            return None
        self._add(name, offer, "cached", size=entry.size)
        return bundle

    def _compilation(
        self, role: str, shapes: Shapes | None, bundle: ModelBundle, device: DevicePlan, offer: Offer
    ) -> None:
        name, identity = f"compile {role}", bundle.identity.get(role)
        if identity is None:
            self._add(name, offer, "to do")
        elif not can_store(bundle, role, device):
            what = "models with adapters" if device.can_export else "this device's models"
            self._add(name, offer, "to do", f"{what} cannot be stored when compiled")
        else:
            dependencies = compile_dependencies(role, identity, device, shapes, bundle.protection)
            if (entry := self._cache.peek(dependencies)) is None:
                self._add(name, offer, "to do", self._cache.explain(dependencies).reason)
            else:
                self._add(name, offer, "cached", size=entry.size)

    def _add(self, stage: str, offer: Offer, state: str, why: str = "", size: int | None = None) -> None:
        self.stages.append(PlannedStage(stage, offer.extension.name, offer.plugin, offer.version, state, why, size))
