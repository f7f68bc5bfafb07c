"""What runs on compiled models: the task, its scheduler, and the adapters that can be switched while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ovforge.config.options import checked
from ovforge.config.pipeline import PipelineConfig, Use
from ovforge.contracts.extensions import GraphTransformExtension, SchedulerExtension, resolve
from ovforge.contracts.stages import Adapter, DevicePlan, Embedder, Scheduler, Task, TaskContext
from ovforge.errors import ConfigError, ModelError, PluginError
from ovforge.model.bundle import ModelBundle
from ovforge.run.adapters import Adapters
from ovforge.run.calls import expect
from ovforge.run.compiled import CompiledBundle
from ovforge.run.resolution import Chosen, ResolvedPipeline, Step, choose

__all__ = ["make_adapter", "make_adapters", "make_task", "plan_device", "require_task", "roles_of"]


def require_task(config: PipelineConfig) -> None:
    """Raise ConfigError for a config without a task: nothing could run its models."""
    if config.task is None:
        raise ConfigError("`task` is missing", where="config", hint="Say what the pipeline is for: task = ...")


def plan_device(pipeline: ResolvedPipeline) -> DevicePlan:
    """Return what the device decides. Raises DeviceError if it is not there, or cannot do what is asked."""
    with pipeline.device.calling():
        return expect(DevicePlan, pipeline.device.create().plan(), pipeline.device.offer)


def roles_of(pipeline: ResolvedPipeline, bundle: ModelBundle) -> list[str]:
    """Return the roles that the task uses. Raises ModelError if one is missing."""
    assert pipeline.task is not None
    extension = pipeline.task.extension
    bundle.require(*extension.roles, advice=extension.advice)
    if not extension.fits(bundle.models):
        raise ModelError(
            f"the model has none of {', '.join(extension.one_of)}, and the task needs one",
            hint=f"It has: {', '.join(sorted(bundle.models))}. {extension.advice}".rstrip(),
        )
    wanted = (*extension.one_of, *extension.roles, *extension.optional_roles)
    return [role for role in wanted if role in bundle.models]


def make_task(pipeline: ResolvedPipeline, compiled: CompiledBundle) -> Task:
    """Build the task; it starts the compilations that it wants, the rest is started for it."""
    task = pipeline.task
    assert task is not None
    context = TaskContext(
        bundle=compiled,
        scheduler=lambda adjust=None: _make_scheduler(pipeline, compiled.source, adjust),
        inputs=pipeline.config.input,
        embedders=_make_embedders(pipeline, compiled.source),
        adapters=compiled.adapters,
        choose=lambda kind, use, where: choose(
            pipeline.session, kind, checked(Use, use, where=where), where, pipeline.base
        ),
    )
    made: Task = expect("__call__", task.create(context), task.offer)
    compiled.start_rest()
    return made


def _make_embedders(pipeline: ResolvedPipeline, bundle: ModelBundle) -> dict[str, Embedder]:
    """Return what transforms offer to compute inputs with, by the inputs' names."""
    embedders: dict[str, Embedder] = {}
    for chosen in (step.chosen for step in pipeline.steps):
        extension = chosen.extension
        if isinstance(extension, GraphTransformExtension) and extension.embedders is not None:
            with chosen.calling():
                embedders |= expect("items", resolve(extension.embedders)(chosen.options, bundle), chosen.offer)
    return embedders


def _make_scheduler(
    pipeline: ResolvedPipeline, bundle: ModelBundle, adjust: Callable[..., Mapping[str, Any]] | None = None
) -> Scheduler:
    """Return the scheduler of the config, or the one that the model names; see `TaskContext.scheduler` for `adjust`."""
    model_config: Mapping[str, Any] = bundle.scheduler_config()
    chosen = pipeline.scheduler or _scheduler_of(model_config, pipeline)
    if adjust is not None:
        extension, own = chosen.extension, model_config.get("_class_name")
        offered = extension.implements if isinstance(extension, SchedulerExtension) else ()
        named = getattr(chosen.options, "class_name", None)
        model_config = adjust(model_config, own=own in offered or (not offered and named in (None, own)))
    scheduler: Scheduler = expect("start", chosen.create(model_config), chosen.offer)
    return scheduler


def _scheduler_of(model_config: Mapping[str, Any], pipeline: ResolvedPipeline) -> Chosen:
    """Return the scheduler that stands for the class which the model names."""
    wanted = model_config.get("_class_name")
    plugins = pipeline.session.plugins
    offers = plugins.all("scheduler")
    for offer in offers:
        if isinstance(offer.extension, SchedulerExtension) and wanted in offer.extension.implements:
            return choose(pipeline.session, "scheduler", Use(offer.extension.name), "scheduler", pipeline.base)
    names = ", ".join(sorted(offer.extension.name for offer in offers)) or "none"
    more = "".join(f" {record.name}: {record.install}." for record in plugins.missing("scheduler"))
    raise PluginError(
        "the model names no scheduler"
        if wanted is None
        else f"the model names the scheduler {wanted!r}, and no plugin here has it",
        where="scheduler",
        hint=f"Set scheduler.use to one of: {names}; some of them run any class: see `ovforge plugins list`."
        + (f" Not installed:{more}" if more else ""),
    )


def make_adapters(
    pipeline: ResolvedPipeline, compiled: CompiledBundle, load: Callable[[Use], Adapter] | None = None
) -> Adapters:
    """Return the adapters of the config, ready to be switched; `load` reads further ones."""
    compiled.adapters = adapters = Adapters(compiled.source.adapters, compiled.variables, load or _no_adapter)
    for step in pipeline.steps:
        if (adapter := make_adapter(step, compiled.source)) is not None:
            adapters.add(adapter)
    return adapters


def make_adapter(step: Step, bundle: ModelBundle) -> Adapter | None:
    """Return what a transform leaves to be switched while running; None if that is nothing."""
    chosen = step.chosen
    extension = chosen.extension
    if not isinstance(extension, GraphTransformExtension) or extension.adapter is None:
        return None
    with chosen.calling():
        adapter = resolve(extension.adapter)(chosen.options, bundle)
        return None if adapter is None else expect("values", adapter, chosen.offer)


def _no_adapter(use: Use) -> Adapter:
    raise ConfigError("adapters are loaded into running pipelines", where=use.use)
