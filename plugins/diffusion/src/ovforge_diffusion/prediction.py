"""What the guided network says at each step of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Arrays
from ovforge_diffusion.conditioning import Schedule
from ovforge_diffusion.denoiser import Denoiser
from ovforge_diffusion.guidance import Guidance
from ovforge_diffusion.inputs import Control
from ovforge_diffusion.request import Request

__all__ = ["Prediction"]

Array = NDArray[np.float32]


class Prediction:
    """A denoiser with all that one run gives it. Each step runs the halves that guidance needs there.

    `controlnets` returns compiled ControlNets by role; `conditions` are the inputs of each condition's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        architecture: Architecture,
        request: Request,
        schedule: Schedule,
        guidance: Guidance,
        controlnets: Callable[[], Mapping[str, ov.CompiledModel]],
        conditions: Sequence[Arrays] = (),
    ) -> None:
        self._denoiser, self._architecture, self._request = denoiser, architecture, request
        self._schedule, self._guidance = schedule, guidance
        shared = {name: denoiser.condition(name, value) for name, value in schedule.at(0).items()}
        rows, held = architecture.constants(request, denoiser.halves)
        shared |= {name: denoiser.condition(name, value) for name, value in rows.items()}
        for name, value in held.items():
            denoiser.hold(name, value)
        if conditions:
            denoiser.control(controlnets(), architecture.conditioned(len(conditions)), shared, held, conditions)

    def at(self, number: int, steps: int, timestep: float, seen: Array, timings: Timings) -> Array:
        """Return the prediction of step `number` of `steps`: float32 in the shape of `seen`.

        Raises InputError for a size that a UNet's skip connections cannot join.
        """
        if self._schedule.changes(number):
            for name, value in self._schedule.at(number).items():
                self._denoiser.change(name, value)
        scales = [c.scale * _counts(c, number, steps) for c in self._request.controls]
        told = self._architecture.timestep(timestep)
        try:
            halves = self._denoiser.predict(seen, told, self._guidance.active(number, steps), scales, timings, number)
        except RuntimeError as error:
            grid, request = self._architecture.grid, self._request
            if request.width % grid or request.height % grid:
                raise InputError(
                    f"this model's {self._architecture.denoiser} cannot work at {request.width}x{request.height}",
                    where="width, height",
                    hint=f"It was converted for multiples of {grid}; the diffusers loader converts for any size.",
                ) from error
            raise
        return self._architecture.predicted(self._guidance.combine(halves))


def _counts(control: Control, number: int, steps: int) -> bool:
    """Say whether a condition counts at a step, as diffusers' `controlnet_keep` does."""
    return not (number / steps < control.start or (number + 1) / steps > control.end)
