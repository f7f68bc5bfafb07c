"""What drives quantizers: a plugin's driver, or none, for quantizers that need no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.contracts.quantization import KeptLayers, Quantized
from ovforge.contracts.stages import Calibration, DevicePlan, Progress, Report, Task
from ovforge.errors import ConfigError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import Protection, Source
from ovforge.run.compiled import CompiledBundle
from ovforge.run.entries import open_entry, write_file
from ovforge.run.identity import caller_dependencies, quantizers_dependencies
from ovforge.run.resolution import ResolvedPipeline
from ovforge.run.stages import StepStage, perform
from ovforge.run.tasks import make_adapters, make_task, roles_of
from ovforge.store.cache import Cache
from ovforge.store.digests import fingerprint

if TYPE_CHECKING:
    from ovforge.contracts.quantization import Observer

__all__ = ["NO_CALIBRATION", "Run", "quantize"]


def quantize(run: Run) -> Quantized:
    """Apply a pipeline's quantizers by its driver; without one, those that need no data."""
    driver, driven_by = run.pipeline.driver, run.pipeline.driven_by
    if driver is None or driven_by is None:
        return Quantized(*run.quantize(_Undriven(run.pipeline)))
    return driver.run(run)


@dataclass(frozen=True)
class Run:
    """A `contracts.quantization.QuantizationRun`: a pipeline, up to its quantizers."""

    pipeline: ResolvedPipeline
    bundle: ModelBundle
    device_plan: DevicePlan
    cache: Cache | None
    progress: Callable[[Progress], None]

    @property
    def quantizers(self) -> Sequence[str]:
        """Names of the quantizers, in their order."""
        return [step.chosen.name for step in self.pipeline.quantizers]

    @cached_property
    def callers(self) -> Mapping[str, Any] | None:
        """What inferences depend on: the models, and who calls them."""
        identity = self.bundle.digest()
        return caller_dependencies(self.pipeline, identity) if identity is not None and self.cache else None

    @cached_property
    def steps(self) -> Mapping[str, Any]:
        """What the quantizers do, and the steps after them."""
        return quantizers_dependencies(self.pipeline)

    @property
    def store(self) -> _Store | None:
        """Where results are kept."""
        return _Store(self.cache, self.bundle.protection, tuple(self.bundle.entries.values())) if self.cache else None

    @property
    def protection(self) -> Protection | None:
        """What keeps all that is made from encrypted models unreadable on disk."""
        return self.bundle.protection

    def quantize(
        self, calibration: Calibration, keep: KeptLayers | None = None, *, trial: bool = False
    ) -> tuple[ModelBundle, list[Report]]:
        """Return what all quantizers make of the bundle, which stays as it is."""
        bundle, reports, steps = self.bundle.copy(), list[Report](), self.pipeline.quantizers
        for step in steps:
            self.progress(Progress("quantize", len(reports), len(steps), step.chosen.name))
            stage = StepStage(step, bundle, self.pipeline, calibration, keep or {}, trial)
            bundle = perform(stage, self.cache)
            reports.append(stage.report)
        self.progress(Progress("quantize", len(reports), len(steps)))
        return bundle, reports

    def start(
        self,
        bundle: ModelBundle,
        inputs: Mapping[str, Any],
        *,
        finish: bool = True,
        approximate: bool = True,
        observe: Observer | None = None,
    ) -> Task:
        """Return the task on a bundle's models, which stay as they are."""
        pipeline = self.pipeline
        if pipeline.task is None:
            raise ConfigError("no task is named that could run the models", where="task", hint="Name one.")
        if finish:
            bundle = bundle.copy()
            for step in pipeline.after:
                if step.approximates and not approximate:
                    continue
                bundle = perform(StepStage(step, bundle, pipeline, NO_CALIBRATION), self.cache)
        compiled = CompiledBundle(bundle, self.device_plan, roles_of(pipeline, bundle), self.cache, observe=observe)
        if finish:
            make_adapters(pipeline, compiled)
        hinted = pipeline.config.model_copy(update={"input": dict(inputs)})
        return make_task(replace(pipeline, config=hinted), compiled)


class _Store:
    """A `contracts.quantization.ResultStore` in the cache."""

    def __init__(self, cache: Cache, sealed: Protection | None, parents: Sequence[str]) -> None:
        self._cache, self._sealed, self._parents = cache, sealed, parents

    def find(self, dependencies: Mapping[str, Any]) -> Source | None:
        """Return the files that were stored; None if there are none."""
        entry = self._cache.get(dependencies)
        return open_entry(entry, self._sealed) if entry else None

    def make(
        self, dependencies: Mapping[str, Any], write: Callable[[Callable[[str, bytes], None]], None], *, label: str
    ) -> Source:
        """Return the files that are stored, or else those that `write` puts there."""
        key = fingerprint(dependencies)

        def write_all(folder: Path) -> None:
            write(lambda path, data: write_file(self._sealed, folder, path, data, key))

        entry, _ = self._cache.get_or_make(dependencies, write_all, label=label, parents=self._parents)
        return open_entry(entry, self._sealed)

    def remove(self, dependencies: Mapping[str, Any]) -> None:
        """Forget what was stored."""
        self._cache.remove(fingerprint(dependencies))


class _Undriven:
    """The calibration of quantizers that nothing drives: it has nothing to give."""

    def __init__(self, pipeline: ResolvedPipeline) -> None:
        self._missing = pipeline.session.plugins.missing("driver")

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        """Raise ConfigError that says what to install."""
        install = "".join(f"Run: {record.install}. " for record in self._missing)
        raise ConfigError(
            "it needs to see inputs of models, and no plugin here records them",
            where="quantize",
            hint=f"{install}Or take a quantizer that needs no data.",
        )

    def score(self, models: Mapping[str, Any]) -> float:
        """Raise ConfigError that says what to install."""
        self.inputs("", 0)
        raise AssertionError


class _NoCalibration:
    """What a transform's step is given: it asks for nothing."""

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        raise AssertionError("only quantizers are calibrated")

    def score(self, models: Mapping[str, Any]) -> float:
        raise AssertionError("only quantizers are calibrated")


NO_CALIBRATION: Calibration = _NoCalibration()
