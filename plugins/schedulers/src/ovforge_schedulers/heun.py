"""Heun's method in numpy: Euler's, corrected by the slope at its end.

Source of the method: Karras et al. 2022, algorithm 1; the numbers are those of `diffusers.HeunDiscreteScheduler`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge_sampling import Array, ClipOptions, NoiseOptions, NoiseScheduler, Prediction, Spacing, SpacingOptions
from ovforge_schedulers.euler import ended
from ovforge_schedulers.runs import SigmaSampling, Turns
from ovforge_schedulers.spacing import Doubles, SigmaOptions, check_not_spread, check_one_spread, schedule

__all__ = ["HeunOptions", "HeunSampling", "HeunScheduler"]


class HeunOptions(NoiseOptions, SpacingOptions, SigmaOptions, ClipOptions):
    """Options of diffusers' HeunDiscreteScheduler."""

    original: ClassVar[str] = "HeunDiscreteScheduler"

    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"
    prediction_type: Prediction = "epsilon"
    clip_sample: bool = False
    timestep_spacing: Spacing = "linspace"


class HeunScheduler(NoiseScheduler[HeunOptions]):
    """Heun's method: two calls of the network a step, one for the last."""

    order = 2

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_one_spread(self.config)

    def run_timesteps(self, timesteps: Doubles) -> HeunSampling:
        """Return a run over timesteps of a call."""
        check_not_spread(self.config)
        return self.run(len(timesteps), timesteps)

    def run(self, steps: int, given: Doubles | None = None) -> HeunSampling:
        """Return a run from the first step on."""
        times, sigmas = schedule(self.config, self.alphas_cumprod, steps, given=given)
        levels = ended(sigmas, 0)
        twice = np.concatenate([levels[:1], levels[1:-1].repeat(2), levels[-1:]])
        return HeunSampling(np.concatenate([times[:1], times[1:].repeat(2)]), twice, self.config)


class HeunSampling(SigmaSampling):
    """One run of Heun's method."""

    def __init__(self, timesteps: NDArray[Any], sigmas: Array, config: HeunOptions) -> None:
        super().__init__(timesteps, sigmas, config)
        self._bound = config.clip_sample_range if config.clip_sample else None
        self._turns = Turns()
        self._slope: Array | None = None
        self._start: Array | None = None

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level: tried, or, every second time, corrected."""
        trying = self._turns.take(index) % 2 == 0
        slope = self.derivative(output, latents, self.sigmas[index])
        if trying:
            width = self.sigmas[index + 1] - self.sigmas[index]
            self._slope, self._start = slope, latents.copy()
            moved: Array = slope * width
            moved += latents
            return moved
        assert self._slope is not None
        assert self._start is not None
        slope += self._slope
        slope *= (self.sigmas[index] - self.sigmas[index - 1]) / 2
        slope += self._start
        return slope

    def clean(self, output: Array, latents: Array, sigma: np.float32) -> Array:
        """Return the predicted picture, clipped if the config says so; a new array."""
        clean = super().clean(output, latents, sigma)
        return clean if self._bound is None else np.clip(clean, -self._bound, self._bound, out=clean)
