"""Trajectory consistency sampling in numpy.

Source of the method: Zheng et al., "Trajectory Consistency Distillation" (2024), algorithm 4 (strategic stochastic
sampling); the numbers are those of `diffusers.TCDScheduler`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge_lcm.scheduler import DistilledOptions, check_distilled, distilled
from ovforge_sampling import ONE, AlphaSampling, Array, NoiseScheduler, predicted_noise, predicted_picture, whole

__all__ = ["TCDOptions", "TCDSampling", "TCDScheduler"]


class TCDOptions(DistilledOptions):
    """Options of diffusers' TCDScheduler, and `eta`."""

    original: ClassVar[str] = "TCDScheduler"
    ours: ClassVar[frozenset[str]] = frozenset(["eta"])

    eta: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much noise each step adds, gamma in the paper; 0 as in diffusers' pipelines, where the method "
        "called by itself takes 0.3",
    )


class TCDScheduler(NoiseScheduler[TCDOptions]):
    """Jumps along the trajectory that a model was distilled to follow."""

    divides_by_alpha = False

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_distilled(self.config, self.alphas_cumprod)

    def run(self, steps: int) -> TCDSampling:
        """Return a run from the first step on; raises InputError for more steps than the model was distilled for."""
        return TCDSampling(distilled(self.config, steps), self.alphas_cumprod, self.config)

    def run_timesteps(self, timesteps: NDArray[np.float64]) -> TCDSampling:
        """Return a run over timesteps of a call, whether or not the model was distilled at them."""
        return TCDSampling(whole(timesteps, self.config), self.alphas_cumprod, self.config)


class TCDSampling(AlphaSampling):
    """One run of TCD."""

    def __init__(self, timesteps: NDArray[np.int64], alphas: Array, config: TCDOptions) -> None:
        super().__init__(timesteps, alphas)
        self._config = config

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Jump below the next timestep, and back up to it with noise; the last step stays."""
        last = index + 1 == len(self.timesteps)
        following = 0 if last else int(self.timesteps[index + 1])
        below = int(np.floor(np.float32(1 - self._config.eta) * np.float32(following)))
        alpha = self.alphas[self.timesteps[index]]
        jump = self.alphas[below]
        predicted = predicted_noise(self._config.prediction_type, output, latents, alpha)
        jumped = predicted_picture(self._config.prediction_type, output, latents, alpha)
        jumped *= np.sqrt(jump)
        jumped += predicted * np.sqrt(ONE - jump)
        if last or self._config.eta == 0:
            return jumped
        kept = self.alphas[following] / jump
        jumped *= np.sqrt(kept)
        jumped += rng.randn(output.shape) * np.sqrt(ONE - kept)
        return jumped
