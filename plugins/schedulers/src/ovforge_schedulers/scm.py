"""Consistency sampling along angles (SCM), in numpy: Sana-Sprint's.

Source of the method: Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2024),
section 2 (TrigFlow); Chen et al., "SANA-Sprint" (2025). The numbers are those of `diffusers.SCMScheduler`: latents are
cos(t) * picture + sin(t) * noise, both of deviation `sigma_data`, and a step takes what its own takes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import FlowRun, RandomStream
from ovforge.errors import InputError
from ovforge_sampling import Array, Options, linspace, refuse
from ovforge_schedulers.flow import FlowScheduling, given

__all__ = ["SCMOptions", "SCMSampling", "SCMScheduler"]

QUARTER = 1.57080
"""The angle of nothing but noise, as diffusers rounds it."""

MIDDLE = 1.3
"""The angle between two steps in diffusers' pipeline."""


class SCMOptions(Options):
    """Options of diffusers' SCMScheduler, and the two that its pipeline gives to a run."""

    original: ClassVar[str] = "SCMScheduler"
    ours: ClassVar[frozenset[str]] = frozenset(["max_timesteps", "intermediate_timesteps"])

    prediction_type: Literal["trigflow"] = "trigflow"
    sigma_data: float = Field(0.5, gt=0)
    max_timesteps: float = Field(QUARTER, gt=0, le=1.571, description="the angle that a run begins at, in radians")
    intermediate_timesteps: float | None = Field(
        None, gt=0, lt=1.571, description="the angle between two steps, in radians: 1.3 if left out"
    )


class SCMScheduler(FlowScheduling[SCMOptions]):
    """Jumps to the picture, and back to a smaller angle with new noise."""

    def run_flow(self, steps: int, flow: FlowRun) -> SCMSampling:
        """Return a run from the first step on."""
        if flow.sigmas is not None:
            what = f"{self.config.original} takes angles (timesteps), not sigmas"
            raise InputError(what, where="sigmas", hint="Leave them out.")
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
