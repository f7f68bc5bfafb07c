"""The pipeline: config -> resolved pipeline -> bundle -> compiled models -> task.

Each stage's result is looked up in the cache by the content of what went in, before it is made.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from ovforge._version import __version__
from ovforge.config.options import checked, input_files
from ovforge.config.pipeline import PipelineConfig, Use
from ovforge.contracts.quantization import Observer
from ovforge.contracts.stages import Adapter, Batching, DevicePlan, Progress, Report, ignore_progress
from ovforge.errors import ConfigError, PluginError, as_path, require_type
from ovforge.model.bundle import is_tokenizer
from ovforge.model.results import PICTURE_SUFFIXES, Result, Timings, read_provenance, values_as_json
from ovforge.model.runtime import openvino_version
from ovforge.model.sources import PACKAGE
from ovforge.plugins.manager import Plugins
from ovforge.run.adapters import Controls
from ovforge.run.ahead import ReadAhead
from ovforge.run.calls import expect, from_caller
from ovforge.run.compiled import CompiledBundle
from ovforge.run.identity import content_of
from ovforge.run.notices import warnings_of
from ovforge.run.resolution import choose, make_step, resolve
from ovforge.run.session import Session
from ovforge.run.stages import check_strict
from ovforge.run.tasks import make_adapter, make_adapters, make_task, plan_device, require_task, roles_of
from ovforge.run.trust import read_trusted
from ovforge.run.turns import Turns
from ovforge.run.walk import Runner, walk
from ovforge.store.cache import Cache, chosen_cache

__all__ = ["Pipeline", "load"]


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
        scheduler: str | Use | None = None,
        device: str | Use = "cpu",
        input: Mapping[str, Any] | None = None,
        optimize: bool = True,
        strict: bool = True,
        base: Path | None = None,
        plugins: Plugins | None = None,
        cache: Cache | str | None = "default",
        progress: Callable[[Progress], None] = ignore_progress,
        **sections: Mapping[str, Any],
    ) -> None:
        for name, table in (("load", load), ("input", input)):
            if table is not None:
                require_type(table, Mapping, where=f"Pipeline: {name}", hint=f'Write: {name}={{"KEY": VALUE}}.')
        for name, steps in (("transforms", transforms), ("quantize", quantize)):
            require_type(steps, (list, tuple), where=f"Pipeline: {name}", hint=f'Write: {name}=["NAME"].')
        parts = {
            "load": {**(load or {}), **({"source": source} if source is not None else {})},
            "transform": tuple(transforms),
            "quantize": tuple(quantize),
            "scheduler": scheduler,
            "device": device,
            "input": dict(input or {}),
            "optimize": optimize,
            "strict": strict,
            **sections,
        }
        if isinstance(task, PipelineConfig):
            _refuse_parts(parts)
        config = (
            task if isinstance(task, PipelineConfig) else PipelineConfig.of({"task": task, **parts}, where="Pipeline")
        )
        self._begin(config, base, plugins, cache, progress)

    @classmethod
    def from_config(
        cls,
        config: PipelineConfig,
        *,
        base: Path | None = None,
        plugins: Plugins | None = None,
        cache: Cache | str | None = "default",
        progress: Callable[[Progress], None] = ignore_progress,
        observe: Observer | None = None,
    ) -> Self:
        """Return the pipeline of a whole config; relative paths start at `base`, by default the current folder.

        `observe` is told of each inference of a model, but for tokenizers', when it is done.
        """
        pipeline = cls.__new__(cls)
        pipeline._begin(config, base, plugins, cache, progress, observe)
        return pipeline

    def _begin(
        self,
        config: PipelineConfig,
        base: Path | None,
        plugins: Plugins | None,
        cache: Cache | str | None,
        progress: Callable[[Progress], None],
        observe: Observer | None = None,
    ) -> None:
        require_type(config, PipelineConfig, where="Pipeline.from_config", hint="ovforge.load takes files and dicts.")
        require_task(config)
        self.config = config
        self.timings = Timings()
        self._began = self._ended = time.perf_counter()
        self._cache = chosen_cache(cache)
        base = Path.cwd() if base is None else as_path(base, where="base")
        ahead = ReadAhead(config, base, self._cache)
        with self.timings.span("load"):
            self._session = Session.of(config, base, plugins, self._cache)
            self.resolved = resolve(config, base, self._session)
            self.device_plan: DevicePlan = plan_device(self.resolved)
            runner = Runner(self.resolved, self.device_plan, self._cache, from_caller(progress))
            bundle = walk(self.resolved, runner, runner.progress)
            assert bundle is not None
            self.bundle = bundle
            self.reports: list[Report] = runner.reports
            self.outcome = runner.outcome
            self._roles = roles_of(self.resolved, self.bundle)
        self._compile_start = time.perf_counter()
        self.compiled = CompiledBundle(
            self.bundle, self.device_plan, self._roles, self._cache, observe=observe, ahead=ahead
        )
        self.controls = Controls(self.bundle.controls, self.compiled.variables)
        self.adapters = make_adapters(self.resolved, self.compiled, self._load_adapter)
        with self.compiled.telling(runner.progress):
            self.task = make_task(self.resolved, self.compiled)
        assert self.resolved.task is not None
        self._turns = Turns(self.resolved.task.extension)
        self._at_start = len(self.compiled.wanted)
        ahead.conclude(self.compiled.stored())

    @property
    def base(self) -> Path:
        """The folder that relative paths start at."""
        return self.resolved.base

    @property
    def inputs_model(self) -> type[BaseModel]:
        """The pydantic model of what a call takes."""
        assert self.resolved.task is not None
        model: type[BaseModel] = self.resolved.task.extension.inputs_model()
        return model

    def __call__(
        self, *arguments: Any, progress: Callable[[Progress], None] = ignore_progress, **inputs: Any
    ) -> Result:
        """Run once. One positional argument is the task's first input; others go by name.

        What is not given comes from the config's [input], then from the task's defaults. Raises ConfigError for an
        unknown or wrong input. `timings` of the result are those of this run alone: see `start_timings`.

        Calls from several threads are safe: they run one after the other, or side by side if the task can do that.
        A process that was forked after the pipeline was loaded cannot call it, and is told so by a DeviceError.
        """
        task = self.resolved.task
        assert task is not None
        model = self.inputs_model
        if len(arguments) > 1:
            raise ConfigError(
                f"{len(arguments)} positional inputs", where="call", hint="Give all but the first by name."
            )
        first = dict(zip(model.model_fields, arguments, strict=False))
        values = self._checked({**first, **inputs})
        start = time.perf_counter()
        tell = from_caller(progress)
        with self._turns, self.compiled.telling(tell), task.calling():
            result = expect(Result, self.task(values, tell), task.offer)
        self._ended = time.perf_counter()
        return self._concluded(result, values, self._ended - start)

    def batch_key(self, inputs: Mapping[str, Any]) -> Hashable | None:
        """Return what a call has in common with those that `together` can run it with; None if it runs alone.

        Raises ConfigError for an unknown or wrong input.
        """
        task = self.resolved.task
        assert task is not None
        if not isinstance(self.task, Batching):
            return None
        values = self._checked(inputs)
        with task.calling():
            return self.task.batch_key(values)

    def together(
        self, calls: Sequence[Mapping[str, Any]], progress: Callable[[Progress], None] = ignore_progress
    ) -> list[Result]:
        """Return the result of each call, which have the same `batch_key`; they run as one if their task can do that.

        Results are those of the calls alone, but for rounding; their timings are those of the whole. Raises as a call.
        """
        task = self.resolved.task
        assert task is not None
        if len(calls) > 1 and isinstance(self.task, Batching):
            values, tell = [self._checked(call) for call in calls], from_caller(progress)
            start = time.perf_counter()
            with self._turns, self.compiled.telling(tell), task.calling():
                whole = expect(Result, self.task(self.task.join(values), tell), task.offer)
                parts = self.task.split(whole, values)
            if parts is not None:
                self._ended = time.perf_counter()
                return [
                    self._concluded(expect(Result, part, task.offer), each, self._ended - start)
                    for part, each in zip(parts, values, strict=True)
                ]
        return [self(progress=progress, **call) for call in calls]

    def _checked(self, inputs: Mapping[str, Any]) -> BaseModel:
        return checked(self.inputs_model, {**self.config.input, **inputs}, where="input", base=self.base)

    def _concluded(self, result: Result, values: BaseModel, seconds: float) -> Result:
        """Return a result with what the core adds to it."""
        task = self.resolved.task
        assert task is not None
        with task.calling():
            expect(dict, result.provenance, task.offer)
        result.timings.elapsed = seconds
        result.warnings = [*result.warnings, *self.warnings()]
        result.provenance = {**self.provenance(), **result.provenance}
        if "inputs" not in result.provenance:
            try:
                result.provenance["inputs"] = values_as_json(values, "input")
            except PluginError as error:  # the result is there, and worth more than a note of how it was made
                result.warnings.append(f"the result does not say how it was made: {error.where}: {error.what}")
        return result

    def _load_adapter(self, use: Use) -> Adapter:
        """Return an adapter that a running pipeline is to take in. Raises ModelError if a part finds no place."""
        step = make_step(self._session, "transform", use, "adapters.load", self.resolved.base)
        adapter = make_adapter(step, self.bundle)
        if adapter is None:
            raise ConfigError(
                "it is not an adapter that can be loaded into a running pipeline",
                where=f"adapters.load: {use.use}",
                hint="Add it to the config as a transform.",
            )
        check_strict(step, Report(skipped=list(adapter.skipped)), self.config.strict)
        return adapter

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning of loading to the end of the last call.

        Less than the sum of the two, if models were still compiling when the call began.
        """
        return self._ended - self._began

    def start_timings(self) -> Timings:
        """Return what it took to get ready: load, then compile, and each role's part of it; waits for compilation.

        Results do not repeat it: their timings are those of the call alone.
        """
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
        resolved = self.resolved
        loaders = [source.loader for source in (resolved.source, *resolved.parts.values())]
        chosen = [
            *loaders,
            resolved.task,
            resolved.device,
            resolved.scheduler,
            *(step.chosen for step in resolved.steps),
        ]
        offers = [one.offer for one in chosen if one is not None]
        offers += [resolved.driven_by] if resolved.driven_by else []
        offers += [offer.worker for offer in offers if offer.worker]
        # Relative paths start at the config's folder; a config without paths says nothing of this machine.
        sources = [self.config.load.source, *self.config.load.parts.values()]
        has_paths = (
            any(input_files(step.chosen.options) for step in resolved.steps)
            or bool(self.config.sections)
            or bool(self.adapters.loaded)
            or not all(source.startswith(PACKAGE) for source in sources)
        )
        return {
            **({"base": str(resolved.base.resolve())} if has_paths else {}),
            "config": {key: value for key, value in self.config.as_dict().items() if key not in ("input", "output")},
            "versions": {
                "ovforge": __version__,
                "openvino": openvino_version(),
                **{offer.plugin: offer.version for offer in offers if offer.plugin != "builtin"},
            },
            "digests": {role: self.bundle.identity.get(role) for role in self._roles},
            "device": {"name": self.device_plan.device, "full_name": self.device_plan.full_name},
            "precision": {role: kind for role, kind in precisions.items() if not is_tokenizer(role)},
            **({"controls": changed} if (changed := self.controls.changed()) else {}),
            **({"adapters": self._adapters_now()} if self.adapters else {}),
            **({"warnings": notes} if (notes := self.warnings()) else {}),
        }

    def warnings(self) -> list[str]:
        """Return what the stages did not apply, their notes, and those of compiling and of adapters loaded later."""
        stages = warnings_of(self.resolved.steps, self.reports)
        return [*stages, *self.compiled.warnings(), *self.adapters.warnings()]

    def _adapters_now(self) -> dict[str, Any]:
        """Return the weight of each adapter, and of those that were loaded later where they came from."""
        memo = self._cache.memo if self._cache else None
        now: dict[str, Any] = {name: {"weight": weight} for name, weight in self.adapters.items()}
        for name, use in self.adapters.loaded.items():
            options = make_step(self._session, "transform", use, "adapters.load", self.resolved.base).chosen.options
            files = [content_of(path, memo) for path in input_files(options)]
            now[name] |= {"use": use.model_dump(mode="json"), "digests": files}
        return now

    def use_scheduler(self, scheduler: str | Use | None) -> None:
        """Sample by another method from the next call on; None stands for the model's own. Nothing is compiled again.

        Raises PluginError for an unknown one and ConfigError for wrong options; all then stays as it was.
        """
        use = None if scheduler is None else checked(Use, scheduler, where="scheduler")
        chosen = None if use is None else choose(self._session, "scheduler", use, "scheduler", self.base)
        config = self.config.model_copy(update={"scheduler": use})
        resolved = replace(self.resolved, config=config, scheduler=chosen)
        with self._turns:
            self.task = make_task(resolved, self.compiled)
            self.config, self.resolved = config, resolved

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


_NO_PARTS = {
    "load": {},
    "transform": (),
    "quantize": (),
    "device": "cpu",
    "input": {},
    "optimize": True,
    "strict": True,
}


def _refuse_parts(parts: Mapping[str, Any]) -> None:
    """Raise ConfigError for parts that are given beside a whole config, which says all of them itself."""
    for name, value in parts.items():
        if value != _NO_PARTS.get(name):
            raise ConfigError(
                f"`{name}` is given beside a whole config",
                where="Pipeline",
                hint="Put it into the config: Pipeline.from_config(config) takes nothing else.",
            )


def load(
    config: str | Path | Mapping[str, Any] | PipelineConfig,
    *,
    overrides: Sequence[str] = (),
    plugins: Plugins | None = None,
    cache: Cache | str | None = "default",
    progress: Callable[[Progress], None] = ignore_progress,
    observe: Observer | None = None,
    trust: bool = False,
) -> Pipeline:
    """Return the pipeline of a config file (.toml, .json), a dict, a PipelineConfig, or a picture that ovforge made.

    A config is trusted: it reads the files that it names, and may say which command prints a key. A picture's is not:
    ConfigError is raised if it uses files outside the picture's folder, unless `trust` is true.
    """
    checked_config, base = read_trusted(config, overrides, trust=trust)
    pipeline = Pipeline.from_config(
        checked_config, base=base, plugins=plugins, cache=cache, progress=progress, observe=observe
    )
    if isinstance(config, str | Path) and Path(config).suffix.lower() in PICTURE_SUFFIXES:
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
