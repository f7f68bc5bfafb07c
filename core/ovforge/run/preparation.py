"""A pipeline's models after all steps, without compiling them: for commands that write or show models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovforge.config.pipeline import PipelineConfig
from ovforge.contracts.quantization import Outcome
from ovforge.contracts.stages import Progress, Report, ignore_progress
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Plugins
from ovforge.run.calls import from_caller
from ovforge.run.resolution import Step, resolve
from ovforge.run.session import Session
from ovforge.run.tasks import plan_device
from ovforge.run.trust import read_trusted
from ovforge.run.walk import Runner, walk
from ovforge.store.cache import Cache, chosen_cache

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A bundle after all steps, with what they did: all of a pipeline but its compiled models."""

    bundle: ModelBundle
    steps: Sequence[Step]
    reports: Sequence[Report]
    outcome: Outcome | None = None

    @property
    def quantized(self) -> list[Report]:
        """The quantizers' reports."""
        pairs = zip(self.steps, self.reports, strict=True)
        return [report for step, report in pairs if step.is_quantizer]


def prepare(
    config: str | Path | Mapping[str, Any] | PipelineConfig,
    *,
    base: Path | None = None,
    plugins: Plugins | None = None,
    cache: Cache | str | None = "default",
    progress: Callable[[Progress], None] = ignore_progress,
    trust: bool = False,
) -> Prepared:
    """Take a pipeline's models through all steps, and stop before they are compiled.

    The config may name no task: its quantizers then cannot see inputs of models unless their driver has some.
    A picture's config may use files outside the picture's folder only if `trust` is true; other configs are trusted.
    """
    store = chosen_cache(cache)
    checked_config, folder = read_trusted(config, trust=trust)
    base = base or folder
    session = Session.of(checked_config, base, plugins, store)
    pipeline = resolve(checked_config, base, session)
    runner = Runner(pipeline, plan_device(pipeline), store, from_caller(progress))
    bundle = walk(pipeline, runner, runner.progress)
    assert bundle is not None
    return Prepared(bundle, pipeline.steps, runner.reports, runner.outcome)
