"""DPM2 and its ancestral form in numpy: a step by the slope half way, between noise levels in their logarithm.

Source of the method: Karras et al. 2022, algorithm 2 as k-diffusion has it (after Lu et al. 2022, DPM-Solver-2); the
numbers are those of diffusers' KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge.errors import InputError
from ovforge_sampling import Array, BetaSchedule, NoiseOptions, NoiseScheduler, Spacing, SpacingOptions, exp, log
from ovforge_schedulers.euler import ancestral, ended
from ovforge_schedulers.runs import SigmaSampling, Turns, scaled
from ovforge_schedulers.spacing import SigmaOptions, check_one_spread, schedule, times_of

__all__ = [
    "DPM2AncestralOptions",
    "DPM2AncestralSampling",
    "DPM2AncestralScheduler",
    "DPM2Options",
    "DPM2Sampling",
    "DPM2Scheduler",
]


class DPM2Options(NoiseOptions, SpacingOptions, SigmaOptions):
    """Options of diffusers' KDPM2DiscreteScheduler."""

    original: ClassVar[str] = "KDPM2DiscreteScheduler"

    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: BetaSchedule = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "linspace"


class DPM2AncestralOptions(DPM2Options):
    """Options of diffusers' KDPM2AncestralDiscreteScheduler."""

    original: ClassVar[str] = "KDPM2AncestralDiscreteScheduler"


class DPM2Scheduler(NoiseScheduler[DPM2Options]):
    """DPM2: two calls of the network a step, one for the last."""

    order = 2

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_one_spread(self.config)

    def run(self, steps: int) -> DPM2Sampling:
        """Return a run from the first step on."""
        times, levels = self._schedule(steps)
        halfway = between(levels[1:], levels[:-1])  # levels[1:]: from the lower one, as diffusers rounds
        return DPM2Sampling(self._with(times, halfway[:-1]), levels, levels, halfway, self.config)

    def _schedule(self, steps: int) -> tuple[NDArray[Any], Array]:
        times, sigmas = schedule(self.config, self.alphas_cumprod, steps)
        return times.round() if self.config.use_karras_sigmas else times, ended(sigmas, 0)

    def _with(self, times: NDArray[Any], halfway: Array) -> NDArray[Any]:
        """Return timesteps with those of the levels half way, one after each but the last."""
        inserted = times_of(halfway, self.alphas_cumprod)
        return np.concatenate([times[:1], np.stack([inserted, times[1:]], axis=-1).ravel()])


class DPM2AncestralScheduler(DPM2Scheduler):
    """DPM2 below the next noise level, and back up to it with new noise."""

    config: DPM2AncestralOptions

    def run(self, steps: int) -> DPM2AncestralSampling:
        """Return a run from the first step on."""
        times, levels = self._schedule(steps)
        down, up = ancestral(levels[:-1], levels[1:])
        halfway = between(levels[:-1], down)
        halfway[-1] = 0
        if not np.all(halfway[:-1] > 0):
            raise InputError(
                f"noise levels of {steps} steps fall so steeply that nothing is left of one, in float32",
                where="steps",
                hint="Give more steps, or set scheduler.use_karras_sigmas = true.",
            )
        return DPM2AncestralSampling(
            self._with(times, halfway[:-1]), levels, np.append(levels[:1], down), halfway, self.config, up
        )


class DPM2Sampling(SigmaSampling):
    """One run of DPM2. `levels[n]` is where step n begins, `ends[n + 1]` where it steps to, by way of `halfway[n]`."""

    def __init__(
        self, timesteps: NDArray[Any], levels: Array, ends: Array, halfway: Array, config: DPM2Options
    ) -> None:
        super().__init__(timesteps, levels, config)
        self._ends, self._halfway = ends, halfway
        self._turns = Turns()
        self._start: Array | None = None

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return latents of about unit variance, at a noise level or half way to the next."""
        return scaled(latents, self._level(index))

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return original + sigma * noise, at the level where the step begins or, half way, at its end."""
        return super().add_noise(original, noise, (index + 1) // 2)

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents half way or, every second time, at the next noise level."""
        self._turns.take(index)
        number = index // 2
        slope = self.derivative(output, latents, self._level(index))
        if index % 2 == 0:
            self._start = latents.copy()
            slope *= self._halfway[number] - self.sigmas[number]
            slope += latents
            return slope
        if self._start is None:
            raise ValueError(f"step {index} is the second half of one: a run begins with a first half")
        slope *= self._ends[number + 1] - self.sigmas[number]
        slope += self._start
        return slope

    def _level(self, index: int) -> np.float32:
        levels = self._halfway if index % 2 else self.sigmas
        return np.float32(levels[index // 2])


class DPM2AncestralSampling(DPM2Sampling):
    """One run of DPM2, ancestral."""

    def __init__(
        self,
        timesteps: NDArray[Any],
        levels: Array,
        ends: Array,
        halfway: Array,
        config: DPM2AncestralOptions,
        up: Array,
    ) -> None:
        super().__init__(timesteps, levels, ends, halfway, config)
        self._up = up

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents half way or, every second time, at the next noise level, with new noise."""
        moved = super().step(output, index, latents, rng)
        if index % 2:
            moved += rng.randn(output.shape) * self._up[index // 2]
        return moved


def between(one: Array, other: Array) -> Array:
    """Return the levels half way in the logarithm, from `one` to `other`."""
    first, second = log(one), log(other)
    with np.errstate(invalid="ignore"):  # the last level is 0
        middle: Array = exp(second - (second - first) * np.float32(0.5))
    return middle
