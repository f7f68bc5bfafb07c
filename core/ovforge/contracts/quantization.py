"""What drives quantizers: a plugin that calibrates them with the pipeline's own runs, and judges what they make.

The core knows the quantizers and their place among the steps; a driver knows where their inputs come from and what is
good enough. The config sections that say so are the driver's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ovforge.contracts.extensions import Need, TaskExtension
from ovforge.contracts.stages import Calibration, Inference, Progress, Report, Task

if TYPE_CHECKING:
    from ovforge.model.bundle import ModelBundle
    from ovforge.model.sources import Protection, Source

__all__ = [
    "Driver",
    "DriverContext",
    "KeptLayers",
    "Observer",
    "Outcome",
    "QuantizationRun",
    "Quantized",
    "ResultStore",
]

KeptLayers = Mapping[str, Collection[str]]
"""Role -> operations that quantizers leave as they are."""

Observer = Callable[[str, Inference], None]
"""Is told of each inference of a role's model, when it is done."""


class Outcome(Protocol):
    """What a driver found out about the quantized pipeline; `str` of it is one line for people."""

    @property
    def passed(self) -> bool:
        """Whether it is good enough."""
        ...

    @property
    def kept(self) -> Mapping[str, Sequence[str]]:
        """The layers, by role, that stay in higher precision so that it is good enough."""
        ...

    def as_json(self) -> dict[str, Any]:
        """Return all of it, JSON-able."""
        ...


@dataclass(frozen=True, slots=True)
class Quantized:
    """What the quantizers made, with a report for each of them, and the outcome if there is one."""

    bundle: ModelBundle
    reports: Sequence[Report]
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class DriverContext:
    """All that a driver is built from, before any model is read."""

    sections: Mapping[str, Any]
    """Name -> its checked model, of the driver's sections that the config has."""

    task: TaskExtension | None
    """What the pipeline is for; None if there is no task, and so nothing that could run its models."""

    base: Path
    """The folder that relative paths start at."""


class ResultStore(Protocol):
    """Results in the cache, encrypted if the models are."""

    def find(self, dependencies: Mapping[str, Any]) -> Source | None:
        """Return the files that were stored for these dependencies; None if there are none."""
        ...

    def make(
        self, dependencies: Mapping[str, Any], write: Callable[[Callable[[str, bytes], None]], None], *, label: str
    ) -> Source:
        """Return the files that are stored, or else those that `write` puts there, by a function of path and data."""
        ...

    def remove(self, dependencies: Mapping[str, Any]) -> None:
        """Forget what was stored for these dependencies."""
        ...


class QuantizationRun(Protocol):
    """What a driver works with: one pipeline, up to its quantizers. Nothing here changes `bundle`."""

    @property
    def bundle(self) -> ModelBundle:
        """The models before the quantizers."""
        ...

    @property
    def quantizers(self) -> Sequence[str]:
        """Names of the quantizers, in their order."""
        ...

    @property
    def callers(self) -> Mapping[str, Any] | None:
        """What inferences depend on: the models, and who calls them. None if that is not known."""
        ...

    @property
    def steps(self) -> Mapping[str, Any]:
        """What the quantizers do, and the steps after them, for keys of results that depend on that."""
        ...

    @property
    def store(self) -> ResultStore | None:
        """Where results are kept; None if nothing is."""
        ...

    @property
    def protection(self) -> Protection | None:
        """What keeps all that is made from encrypted models unreadable on disk."""
        ...

    @property
    def progress(self) -> Callable[[Progress], None]:
        """Tell it of long work."""
        ...

    def quantize(
        self, calibration: Calibration, keep: KeptLayers | None = None, *, trial: bool = False
    ) -> tuple[ModelBundle, list[Report]]:
        """Return what all quantizers make of `bundle`; a trial is not stored, and reports instead of refusing."""
        ...

    def start(
        self,
        bundle: ModelBundle,
        inputs: Mapping[str, Any],
        *,
        finish: bool = True,
        approximate: bool = True,
        observe: Observer | None = None,
    ) -> Task:
        """Return the task on a bundle's models; `inputs` hints at the calls to come.

        With `finish`, the steps after the quantizers are applied first, and adapters act at their weights; without
        `approximate`, those that change results by design are left out, as the gate's reference needs it. `observe` is
        told of each inference of a model, when it is done.
        """
        ...


class Driver(Protocol):
    """Calibrates quantizers and judges their result. The factory takes a DriverContext.

    It reads and checks all that its sections name, so that a mistake is known before any work.
    """

    @property
    def judges(self) -> bool:
        """Whether its sections ask it to judge the result."""
        ...

    def content(self, need: Need, digest: Callable[[Path], str]) -> Mapping[str, Any]:
        """Return, JSON-able, what a quantizer with this need gets from the driver; files count by their digest."""
        ...

    def known(self, run: QuantizationRun) -> Outcome | None:
        """Return the outcome if it is stored. Does no work: plans ask for it."""
        ...

    def run(self, run: QuantizationRun) -> Quantized:
        """Quantize. Raises QualityError if the result is not good enough."""
        ...
