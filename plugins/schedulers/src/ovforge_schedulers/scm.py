"""Consistency sampling along angles (SCM), in numpy: Sana-Sprint's.

Source of the method: Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2024),
section 2 (TrigFlow); Chen et al., "SANA-Sprint" (2025). The numbers are those of `diffusers.SCMScheduler`: latents are
cos(t) * picture + sin(t) * noise, both of deviation `sigma_data`, and a step takes what its own takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import FlowRun, RandomStream
from ovforge.errors import InputError
from ovforge_sampling import Array, Options, Run, linspace, refuse, takes_none
from ovforge_schedulers.flow import FlowScheduling, given

__all__ = ["SCMOptions", "SCMSampling", "SCMScheduler"]

QUARTER = 1.57080
"""The angle of nothing but noise, as diffusers rounds it."""

_LARGEST = 1.571
"""A quarter of a circle, rounded up, since people write it with few digits."""

MIDDLE = 1.3
"""The angle between two steps in diffusers' pipeline."""


class SCMOptions(Options):
    """Options of diffusers' SCMScheduler, and the two that its pipeline gives to a run."""

    original: ClassVar[str] = "SCMScheduler"
    ours: ClassVar[frozenset[str]] = frozenset(["max_timesteps", "intermediate_timesteps"])

    prediction_type: Literal["trigflow"] = "trigflow"
    sigma_data: float = Field(0.5, gt=0)
    max_timesteps: float = Field(QUARTER, gt=0, le=_LARGEST, description="the angle that a run begins at, in radians")
    intermediate_timesteps: float | None = Field(
        None, gt=0, lt=_LARGEST, description="the angle between two steps, in radians: 1.3 if left out"
    )


class SCMScheduler(FlowScheduling[SCMOptions]):
    """Jumps to the picture, and back to a smaller angle with new noise."""

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> Run:
        """Begin a run. Angles that are given hold the one that it ends at, too, and say how many steps there are."""
        if flow.timesteps is not None:
            _check_angles(flow.timesteps)
            steps = len(flow.timesteps) - 1
        return super().start_flow(steps, flow, strength)

    def run_flow(self, steps: int, flow: FlowRun) -> SCMSampling:
        """Return a run from the first step on."""
        if flow.sigmas is not None:
            raise takes_none(self.config, "sigmas", ": it takes angles, as timesteps")
        angles = given(flow.timesteps, steps + 1, "timesteps")
        return SCMSampling(self._angles(steps) if angles is None else angles.astype(np.float32), self.config.sigma_data)

    def _angles(self, steps: int) -> Array:
        config = self.config
        if steps == 2:
            middle = config.intermediate_timesteps or MIDDLE
            if middle >= config.max_timesteps:
                what = f"{middle:g} is not below max_timesteps = {config.max_timesteps:g}, and angles fall"
                raise refuse(config, "intermediate_timesteps", what, "Give a smaller one.")
            return np.array([config.max_timesteps, middle, 0], np.float32)
        if config.intermediate_timesteps is not None:
            raise InputError(
                f"scheduler.intermediate_timesteps is for 2 steps, and there are {steps}",
                where="steps",
                hint="Give 2, or leave the option out.",
            )
        return linspace(config.max_timesteps, 0, steps + 1)


def _check_angles(angles: Sequence[float]) -> None:
    """Raise InputError for angles of a call that do not fall, or that are none."""
    if len(angles) < 2 or angles[0] > _LARGEST or any(after >= before for before, after in pairwise(angles)):
        raise InputError(
            "they are not two or more angles that fall",
            where="timesteps",
            hint=f"Give radians, from {QUARTER} at most; the last one is where the run ends, which is 0.",
        )


class SCMSampling:
    """One run. `timesteps` are the angles of its steps, in radians; the arrays that `step` returns are the caller's."""

    init_noise_sigma = 1.0
    """As diffusers': its pipeline multiplies the first noise, and what the network says, by `sigma_data`."""
    first = 0

    def __init__(self, angles: Array, sigma_data: float) -> None:
        self.timesteps: NDArray[Any] = angles[:-1]
        self.sigma_data = sigma_data
        self._cosines = [np.float32(math.cos(angle)) for angle in angles]
        self._sines = [np.float32(math.sin(angle)) for angle in angles]

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents: this method scales nothing."""
        return latents

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return cos(t) * original + sin(t) * sigma_data * noise."""
        noised: Array = noise * np.float32(self.sigma_data)
        return self._mixed(original, noised, index)

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Jump to the picture, and back to the next angle with noise; the last step stays there."""
        clean: Array = output * -self._sines[index]
        clean += self._cosines[index] * latents
        if index + 1 == len(self.timesteps):
            return clean
        return self._mixed(clean, rng.randn(output.shape) * np.float32(self.sigma_data), index + 1)

    def _mixed(self, original: Array, noise: Array, index: int) -> Array:
        """Return cos(t) * original + sin(t) * noise; changes `noise`."""
        noise *= self._sines[index]
        noise += self._cosines[index] * original
        return noise
