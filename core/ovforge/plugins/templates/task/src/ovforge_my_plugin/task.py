"""The task itself: numbers in, a label and its probability out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ovforge.contracts import Progress, TaskContext
from ovforge.errors import ConfigError, InputError
from ovforge.model import Result, Timings
from ovforge.store import atomic_write
from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What a config may say of the task. A misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: tuple[str, ...] = Field((), description="The names of the classes; their numbers by default.")


class Inputs(BaseModel):
    """What one call takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: tuple[float, ...] = Field(description="One number for each input of the model.")


@dataclass
class LabelResult(Result):
    """The label that is most probable, and the probability of each."""

    label: str = ""
    probabilities: dict[str, float] | None = None

    def save(self, path: Path | str) -> list[Path]:
        """Write the result as JSON; return the file."""
        content = {"label": self.label, "probabilities": self.probabilities, "provenance": self.provenance}
        atomic_write(Path(path), json.dumps(content, indent=2).encode())
        return [Path(path)]


class Task:
    """Runs the role "model". Each call has an inference request of its own, so threads may call it side by side."""

    def __init__(self, options: Options, context: TaskContext) -> None:
        self._labels, self._models = options.labels, context.bundle
        self._models.start("model")  # compiles in the background

    def __call__(self, inputs: Inputs, progress: Callable[[Progress], None]) -> LabelResult:
        """Classify. Raises InputError if the model takes another number of features."""
        timings = Timings()
        model = self._models["model"]
        width = model.input(0).get_partial_shape()[1]
        if width.is_static and len(inputs.features) != width.get_length():
            raise InputError(
                f"the model takes {width.get_length()} numbers, not {len(inputs.features)}", where="input.features",
                hint="Give as many as the model was trained with.",
            )  # fmt: skip
        progress(Progress("classify", 0, 1))
        with timings.span("model"):
            request = model.create_infer_request()
            scores = request.infer([np.array([inputs.features], np.float32)])[0][0].astype(np.float64)
        progress(Progress("classify", 1, 1))
        exponents = np.exp(scores - scores.max())
        named = dict(zip(self._names(len(scores)), (exponents / exponents.sum()).tolist(), strict=True))
        return LabelResult(
            timings=timings,
            provenance={"inputs": {"features": list(inputs.features)}},
            label=max(named, key=lambda name: named[name]),
            probabilities=named,
        )

    def _names(self, classes: int) -> tuple[str, ...]:
        if self._labels and len(self._labels) != classes:
            raise ConfigError(
                f"the model has {classes} classes, not {len(self._labels)}",
                where="task.labels",
                hint="Name each class.",
            )
        return self._labels or tuple(map(str, range(classes)))

    def examples(self, count: int) -> Sequence[Inputs]:
        """Return inputs for calibration and benchmarks: always the same ones, each different."""
        width = self._models["model"].input(0).get_partial_shape()[1].get_length()
        rows = np.random.default_rng(0).normal(size=(count, width))
        return [Inputs(features=tuple(row)) for row in rows.tolist()]

    def compare(self, result: LabelResult, reference: LabelResult) -> float:
        """Return 1 if all probabilities are equal, and 0 if the results share none."""
        ours, theirs = result.probabilities or {}, reference.probabilities or {}
        return 1 - sum(abs(ours.get(name, 0) - theirs.get(name, 0)) for name in {*ours, *theirs}) / 2
