"""Steps that run the outer part of a denoiser alone, with what its inner part gave at earlier steps.

What the deep levels of a UNet give, or the later blocks of a transformer add, changes little from one step to the next.
The transform `step-cache` makes the outer part a model of its own; this runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.model import Timings
from ovforge_diffusion.forecast import Forecast
from ovforge_diffusion.network import Network

__all__ = ["CACHED", "FIRST", "ShallowSteps", "StepRule", "shallow_role"]

CACHED = "ovforge_cached_features"
"""Name of the whole denoiser's output, and the outer part's input, for what the inner part gives."""

FIRST = "ovforge_first_block"
"""Name of the output of both for what the first block adds, if a threshold looks at it."""

Rows = NDArray[np.bool_]


def shallow_role(denoiser: str) -> str:
    """Return the role of the outer part of a denoiser."""
    return f"{denoiser}_shallow"


@dataclass(frozen=True)
class StepRule:
    """When the whole denoiser runs: in `warmup` first steps, every `interval` steps, or by a threshold; and the order
    of what is predicted in between.
    """

    interval: int | None
    warmup: int
    threshold: float | None
    order: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> StepRule:
        """Read the outer part's config.json."""
        threshold = config.get("threshold")
        return cls(
            interval=None if config["interval"] is None else int(config["interval"]),
            warmup=int(config["warmup"]),
            threshold=None if threshold is None else float(threshold),
            order=int(config["order"]),
        )


class ShallowSteps:
    """The outer part beside the whole network: one request for each of its calls, all on the same tensors.

    Each call, and each row of a batch, has values of its own, so that a picture is what it is alone.
    """

    def __init__(self, model: ov.CompiledModel, networks: Sequence[Network], rule: StepRule) -> None:
        role = shallow_role(networks[0].role)
        self._calls = [_Call(whole, Network(model, role), rule) for whole in networks]

    def begin(self) -> None:
        """Forget what the calls gave in another run."""
        for call in self._calls:
            call.begin()

    def run(self, call: int, step: int, timings: Timings) -> None:
        """Make a call's prediction at a step of a run, where the whole network writes it."""
        self._calls[call].run(step, timings)


class _Call:
    """One call of the whole network, with what it gave at earlier steps of a run."""

    def __init__(self, whole: Network, outer: Network, rule: StepRule) -> None:
        self._whole, self._outer, self._rule = whole, outer, rule
        self._forecast: Forecast | None = None
        self._first: NDArray[np.floating] | None = None
        self._begun = 0
        # What the outer part takes is an input of the whole network, but for what is kept.
        known = whole.ports
        self._inputs = [
            (port, next(n for n in port.names if n in known))
            for port in outer.ports.values()
            if CACHED not in port.names
        ]

    def begin(self) -> None:
        self._forecast = None

    def run(self, step: int, timings: Timings) -> None:
        """Run the outer part, or the whole, or both: the whole for the rows that need it."""
        output = self._whole.request.get_output_tensor(0).data
        due = self._due(step, len(output))
        if not due.all():
            with timings.span(f"denoise.{self._outer.role}"):
                self._run_outer(step)
            due |= self._changed()
        if due.any():
            with timings.span(f"denoise.{self._whole.role}"):
                rest = output[~due].copy()
                self._whole.run()
                output[~due] = rest
                self._learn(due, step)

    def _due(self, step: int, rows: int) -> Rows:
        """Return which rows need the whole network, whatever the outer part says."""
        rule, forecast = self._rule, self._forecast
        if forecast is None or step - self._begun < rule.warmup:
            return np.ones(rows, np.bool_)
        return forecast.since(step) >= rule.interval if rule.interval is not None else np.zeros(rows, np.bool_)

    def _run_outer(self, step: int) -> None:
        whole, outer = self._whole, self._outer
        assert self._forecast is not None
        for port, name in self._inputs:
            outer.request.set_tensor(port, whole.request.get_tensor(whole.ports[name]))
        kept = outer.allocate(CACHED, whole.request.get_tensor(whole.outputs[CACHED]).shape)
        self._forecast.tell(step, kept.data)
        outer.request.set_output_tensor(0, whole.request.get_output_tensor(0))
        outer.run()

    def _changed(self) -> Rows | bool:
        """Return the rows of which the first block's part has changed by more than the threshold."""
        if self._rule.threshold is None or self._first is None:
            return False
        now = self._outer.request.get_tensor(self._outer.outputs[FIRST]).data
        return _mean(now - self._first) > self._rule.threshold * _mean(self._first)

    def _learn(self, rows: Rows, step: int) -> None:
        values = self._whole.request.get_tensor(self._whole.outputs[CACHED]).data
        if self._forecast is None:
            self._forecast, self._begun = Forecast(self._rule.order, values), step
            self._first = None
        self._forecast.learn(rows, values, step)
        if self._rule.threshold is not None:
            first = self._whole.request.get_tensor(self._whole.outputs[FIRST]).data
            if self._first is None:
                self._first = first.copy()
            else:
                self._first[rows] = first[rows]


def _mean(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean of what values are without their sign, of each row."""
    means: NDArray[np.float64] = np.abs(values).mean(axis=tuple(range(1, values.ndim)), dtype=np.float64)
    return means
