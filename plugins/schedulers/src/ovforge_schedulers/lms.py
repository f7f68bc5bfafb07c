"""Linear multistep sampling in numpy.

Source of the method: Adams and Bashforth's, over uneven noise levels, as in k-diffusion; the numbers are those of
`diffusers.LMSDiscreteScheduler`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import RandomStream
from ovforge_sampling import Array, BetaSchedule, NoiseOptions, NoiseScheduler, Prediction, Spacing, SpacingOptions
from ovforge_schedulers.euler import ended
from ovforge_schedulers.runs import SigmaSampling, Turns
from ovforge_schedulers.spacing import SigmaOptions, check_one_spread, schedule

__all__ = ["LMSOptions", "LMSSampling", "LMSScheduler"]

ORDER = 4
NODES, WEIGHTS = np.polynomial.legendre.leggauss(2)
"""Gauss's quadrature: exact for polynomials of degree 3, which the basis of four levels is."""


class LMSOptions(NoiseOptions, SpacingOptions, SigmaOptions):
    """Options of diffusers' LMSDiscreteScheduler."""

    original: ClassVar[str] = "LMSDiscreteScheduler"

    beta_schedule: BetaSchedule = "linear"
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "linspace"


class LMSScheduler(NoiseScheduler[LMSOptions]):
    """A polynomial through the last four predictions of noise, integrated to the next noise level."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_one_spread(self.config)

    def run(self, steps: int) -> LMSSampling:
        """Return a run from the first step on."""
        config = self.config.without_ends() if self.config.use_karras_sigmas else self.config
        times, sigmas = schedule(config, self.alphas_cumprod, steps)
        return LMSSampling(times, ended(sigmas, 0), config)


class LMSSampling(SigmaSampling):
    """One run of LMS."""

    def __init__(self, timesteps: NDArray[Any], sigmas: Array, config: LMSOptions) -> None:
        super().__init__(timesteps, sigmas, config)
        self._turns = Turns()
        self._history: list[Array] = []

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level. Raises ValueError out of order."""
        self._turns.take(index)
        newest = self.derivative(output, latents, self.sigmas[index])
        self._history = [*self._history[1 - ORDER :], newest]
        moved = latents.copy()
        # A run that begins later has fewer predictions than its order; diffusers leaves the others out, too.
        for weight, slope in zip(self._weights(index), reversed(self._history), strict=False):
            moved += slope * weight
        return moved

    def _weights(self, index: int) -> list[np.float32]:
        """Return the integrals of Lagrange's basis over the step, the newest level's first."""
        levels = self.sigmas[index::-1][:ORDER].astype(np.float64)
        begin, end = levels[0], float(self.sigmas[index + 1])
        nodes = (end + begin) / 2 + NODES * (end - begin) / 2
        weights = []
        for number, level in enumerate(levels):
            others = np.delete(levels, number)
            basis = np.prod((nodes[:, None] - others) / (level - others), axis=1)
            weights.append(np.float32(WEIGHTS @ basis * (end - begin) / 2))
        return weights
