"""DPM++ SDE in numpy: two calls of the network a step, along one path of Brownian motion.

Source of the method: k-diffusion's `sample_dpmpp_sde`, after Lu et al., "DPM-Solver++" (2022); the numbers are those of
`diffusers.DPMSolverSDEScheduler`, but for its noise. That comes from torchsde, with a seed of its own. Here it comes
from the stream of the run: the increments of the same Brownian motion over noise levels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge_sampling import (
    Array,
    BetaSchedule,
    NoiseOptions,
    NoiseScheduler,
    Spacing,
    SpacingOptions,
    exp,
    expm1,
    log,
    refuse,
)
from ovforge_schedulers.euler import ancestral, ended
from ovforge_schedulers.runs import SigmaSampling, Turns, scaled
from ovforge_schedulers.spacing import SigmaOptions, check_one_spread, schedule, times_of

__all__ = ["DPMSDEOptions", "DPMSDESampling", "DPMSDEScheduler"]


class DPMSDEOptions(NoiseOptions, SpacingOptions, SigmaOptions):
    """Options of diffusers' DPMSolverSDEScheduler, but for a seed of its own: the run's decides all."""

    original: ClassVar[str] = "DPMSolverSDEScheduler"

    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: BetaSchedule = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "linspace"
    noise_sampler_seed: Any = Field(None, description="not here: the noise is that of the run's seed")


class DPMSDEScheduler(NoiseScheduler[DPMSDEOptions]):
    """DPM++ SDE: two calls of the network a step, one for the last."""

    order = 2

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_one_spread(self.config)
        if self.config.noise_sampler_seed is not None:
            what = "noise of torchsde's is not made here; that of the run's own seed is"
            raise refuse(self.config, "noise_sampler_seed", what)

    def run(self, steps: int) -> DPMSDESampling:
        """Return a run from the first step on."""
        config = self.config.without_ends() if self.config.use_karras_sigmas else self.config
        times, sigmas = schedule(config, self.alphas_cumprod, steps, dtype=np.float64)
        middle = times_of(np.exp(np.log(sigmas[:-1]) + np.diff(np.log(sigmas)) / 2), self.alphas_cumprod)
        every = np.concatenate([times[:1], np.stack([middle, times[1:]], axis=-1).ravel()])
        return DPMSDESampling(every, ended(sigmas, 0), config)


class DPMSDESampling(SigmaSampling):
    """One run of DPM++ SDE. `levels[n]` is where step n begins, `halfway[n]` where its second call is made."""

    def __init__(self, timesteps: NDArray[Any], levels: Array, config: DPMSDEOptions) -> None:
        super().__init__(timesteps, levels, config)
        self._logs = -log(levels)
        ahead = self._logs[:-2] + np.diff(self._logs[:-1]) * np.float32(0.5)
        self._halfway: Array = exp(-ahead)
        self._turns = Turns()
        self._start: Array | None = None
        self._drawn: Array | None = None

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return latents of about unit variance, at a noise level or half way to the next."""
        return scaled(latents, self._level(index))

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return original + sigma * noise, at the level where the step begins or, half way, at its end."""
        return super().add_noise(original, noise, (index + 1) // 2)

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents half way or, every second time, at the next noise level, with new noise."""
        self._turns.take(index)
        number = index // 2
        begin = self.sigmas[number]
        clean = self.clean(output, latents, self._level(index))
        if number == len(self._halfway):
            return clean
        noise = rng.randn(output.shape)
        if index % 2 == 0:
            self._start, self._drawn = latents.copy(), noise
            return self._moved(latents, clean, begin, self._halfway[number], noise)
        if self._start is None or self._drawn is None:
            raise ValueError(f"step {index} is the second half of one: a run begins with a first half")
        # The path's increment over the whole step is that over its first half and a new one over its second.
        middle, end = self._halfway[number], self.sigmas[number + 1]
        whole = self._drawn * np.sqrt((begin - middle) / (begin - end))
        whole += noise * np.sqrt((middle - end) / (begin - end))
        return self._moved(self._start, clean, begin, end, whole)

    def _moved(self, latents: Array, clean: Array, begin: np.float32, end: np.float32, noise: Array) -> Array:
        down, up = ancestral(begin, end)
        moved: Array = latents * (down / begin)
        moved -= clean * expm1(log(down) - log(begin))
        moved += noise * up
        return moved

    def _level(self, index: int) -> np.float32:
        levels = self._halfway if index % 2 else self.sigmas
        return np.float32(levels[index // 2])
