"""The one walk over a pipeline's stages up to compilation; running and planning are two visitors of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ovforge.contracts.quantization import Outcome
from ovforge.contracts.stages import DevicePlan, Progress, Report
from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.run.quantizing import NO_CALIBRATION, Run, quantize
from ovforge.run.stages import LoadStage, StepStage, perform
from ovforge.store.documents import parse_object

if TYPE_CHECKING:
    from ovforge.run.resolution import ResolvedPipeline, Step
    from ovforge.store.cache import Cache

__all__ = ["Runner", "Visitor", "walk"]


class Visitor(Protocol):
    """Does a stage, or sees what would be done. Behind a stage that is to do, a plan has no bundle: it is None."""

    def load(self, name: str, stage: LoadStage) -> ModelBundle | None: ...

    def step(self, step: Step, bundle: ModelBundle | None) -> ModelBundle | None: ...

    def quantize(self, bundle: ModelBundle | None) -> ModelBundle | None: ...


def walk(pipeline: ResolvedPipeline, visitor: Visitor, progress: Callable[[Progress], None]) -> ModelBundle | None:
    """Visit every stage in order: load, parts, the steps before quantizers, the quantizers and the gate, the rest."""
    bundle = visitor.load("load", LoadStage(pipeline.source, progress))
    for role, part in pipeline.parts.items():
        loaded = visitor.load(f"load {role}", LoadStage(part, progress))
        if bundle is None or loaded is None:
            bundle = None
        else:
            _put_part(bundle, role, loaded, part.source.name)
    if bundle is not None:
        bundle.protection = pipeline.protection
    for step in pipeline.before:
        bundle = visitor.step(step, bundle)
    if pipeline.quantizers or pipeline.gated:
        bundle = visitor.quantize(bundle)
    for step in pipeline.after:
        bundle = visitor.step(step, bundle)
    return bundle


def _put_part(bundle: ModelBundle, role: str, part: ModelBundle, name: str) -> None:
    """Give `bundle` another model for `role`: the one of that role in `part`, or the only one that `part` has.

    Of several, a "preview_decoder" may be the only one whose name ends in "_decoder". A part that is not a pipeline
    does not know its number: its "text_encoder" may be a "text_encoder_2". A tokenizer brings its files, and a folder
    of one model its config.json.
    """
    stem = re.sub(r"_\d+$", "", role)
    alike = [name for name in part.models if name.rpartition("_")[2] == role.rpartition("_")[2]]
    if not alike and not part.index and stem in part.models:
        alike = [stem]
    named = [role] if role in part.models else alike if len(part.models) > 1 else list(part.models)
    chosen = named[0] if len(named) == 1 else None
    if chosen is None:
        raise ModelError(
            f"it has no {role!r}", where=f"load.parts.{role}: {name}", hint=f"It has: {', '.join(sorted(part.models))}."
        )
    bundle.take(role, part, chosen)
    if chosen == "model":  # a folder of one model, whose files lie beside it
        assets = {path: data for path, data in part.assets.items() if "/" not in path}
        if (config := assets.pop("config.json", None)) is not None:
            bundle.configs[role] = parse_object(config, f"{name}/config.json")
    else:
        beside = f"{chosen}/"
        assets = {path.removeprefix(beside): data for path, data in part.assets.items() if path.startswith(beside)}
    for path in [path for path in bundle.assets if assets and path.startswith(f"{role}/")]:
        del bundle.assets[path]
    bundle.assets.update({f"{role}/{path}": data for path, data in assets.items()})


@dataclass
class Runner:
    """Does every stage, or takes its result from the cache; collects a report for each step."""

    pipeline: ResolvedPipeline
    device_plan: DevicePlan
    cache: Cache | None
    progress: Callable[[Progress], None]
    reports: list[Report] = field(default_factory=list)
    outcome: Outcome | None = None

    def load(self, name: str, stage: LoadStage) -> ModelBundle:
        """Open a source."""
        stage.check()
        return perform(stage, self.cache)

    def step(self, step: Step, bundle: ModelBundle | None) -> ModelBundle:
        """Change the bundle."""
        assert bundle is not None
        stage = StepStage(step, bundle, self.pipeline, NO_CALIBRATION)
        changed = perform(stage, self.cache)
        self.reports.append(stage.report)
        return changed

    def quantize(self, bundle: ModelBundle | None) -> ModelBundle:
        """Quantize by the driver."""
        assert bundle is not None
        quantized = quantize(Run(self.pipeline, bundle, self.device_plan, self.cache, self.progress))
        self.reports += quantized.reports
        self.outcome = quantized.outcome
        return quantized.bundle
