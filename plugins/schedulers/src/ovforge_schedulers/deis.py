"""DEIS in numpy.

Source of the method: Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator" (2023), the
log-rho multistep form; the numbers are those of `diffusers.DEISMultistepScheduler`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from ovforge.contracts import FlowRun, RandomStream
from ovforge_sampling import ONE, Array, exp
from ovforge_schedulers.runs import SolverSampling
from ovforge_schedulers.solvers import (
    SolverScheduler,
    SpacedSolverOptions,
    check_spreads,
    instead_of,
    noise_levels,
    scheduled,
)
from ovforge_schedulers.spacing import sigma_table, spaced_before_end

__all__ = ["DEISOptions", "DEISSampling", "DEISScheduler"]

FEW = 15
"""Below this many steps diffusers lowers the order of the last two, for stability."""


class DEISOptions(SpacedSolverOptions):
    """Options of diffusers' DEISMultistepScheduler."""

    original: ClassVar[str] = "DEISMultistepScheduler"

    algorithm_type: Annotated[Literal["deis"], instead_of({"dpmsolver": "deis", "dpmsolver++": "deis"})] = "deis"
    solver_type: Annotated[
        Literal["logrho"], instead_of({"midpoint": "logrho", "heun": "logrho", "bh1": "logrho", "bh2": "logrho"})
    ] = "logrho"


class DEISScheduler(SolverScheduler[DEISOptions]):
    """A polynomial in log rho through the last predictions of noise, one call of the network a step."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_spreads(self.config)

    def run(self, steps: int, flow: FlowRun | None = None) -> DEISSampling:
        """Return a run from the first step on. Raises InputError for levels of a pipeline's own."""
        self.without_levels(flow)
        config, train = self.config, self.config.num_train_timesteps
        times = spaced_before_end(config.timestep_spacing, train, train, steps, config.steps_offset)
        spaced, levels = noise_levels(config, self.alphas_cumprod, times, steps, mu=self.mu(flow))
        # Of spread levels, the lowest is the end; else, that of the first timestep of training.
        end = sigma_table(self.alphas_cumprod)[0] if spaced is times else levels[-1]
        return DEISSampling(*scheduled(config, spaced, levels, end), config)


class DEISSampling(SolverSampling):
    """One run of DEIS."""

    def __init__(self, *schedule: Any) -> None:
        super().__init__(*schedule)
        self._history: list[Array] = []

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level. Raises ValueError out of order."""
        self.turns.take(index)
        self._history = [*self._history[-2:], self._noise(output, latents, index)]
        order = min(self.config.solver_order, len(self._history), self._highest(index))
        if order == 1:
            h = self.lambdas[index + 1] - self.lambdas[index]
            moved: Array = latents * (self.alpha[index + 1] / self.alpha[index])
            moved -= self._history[-1] * (self.sigma[index + 1] * (exp(h) - ONE))
            return moved
        moved = latents / self.alpha[index]
        for weight, noise in zip(self._weights(index, order), reversed(self._history), strict=False):
            moved += noise * weight
        moved *= self.alpha[index + 1]
        return moved

    def _noise(self, output: Array, latents: Array, index: int) -> Array:
        if self.config.prediction_type == "epsilon" and not self.config.thresholding:
            return output.copy()
        noise: Array = latents - self.alpha[index] * self.clean(output, latents, index)
        # For flows diffusers divides by the ratio of noise to picture, not by the noise itself.
        noise /= (self.sigmas if self.config.prediction_type == "flow_prediction" else self.sigma)[index]
        return noise

    def _highest(self, index: int) -> int:
        """Return the order that the end of the run allows."""
        few = self.config.lower_order_final and len(self.timesteps) < FEW
        return min(len(self.timesteps) - index, 3) if few else 3

    def _weights(self, index: int, order: int) -> list[np.float32]:
        """Return the integrals over rho of Lagrange's basis in log rho, the newest level's first."""
        rho = self.sigma / self.alpha
        levels = [rho[index - back] for back in range(order)]
        weights = []
        for number, level in enumerate(levels):
            others = [levels[(number + turn) % order] for turn in range(1, order)]
            weights.append(_integral(rho[index + 1], level, *others) - _integral(levels[0], level, *others))
        return weights


def _integral(t: np.float32, b: np.float32, c: np.float32, d: np.float32 | None = None) -> np.float32:
    """Return the antiderivative at `t` of the basis that is 1 at log b and 0 at log c and log d.

    In numpy's float32 logarithm, and in diffusers' order: this is a small difference of large numbers.
    """
    log = np.log
    if d is None:
        return np.float32(t * (-log(c) + log(t) - 1) / (log(b) - log(c)))
    product = log(c) * (log(d) - log(t) + 1) - log(d) * log(t) + log(d) + log(t) * log(t) - 2 * log(t) + 2
    return np.float32(t * product / ((log(b) - log(c)) * (log(b) - log(d))))
