"""What the multistep and the singlestep DPM-Solver share: options, and the weights of a step.

Sources: Lu et al., "DPM-Solver" (2022) and "DPM-Solver++" (2022), equations 3.7 to 3.9 of the former and the appendix
of the latter; the forms with noise ("sde") are diffusers'. A method of order n adds n - 1 corrections to Euler's step
in lambda.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge_sampling import ONE, Array, exp, refuse, thresholded
from ovforge_schedulers.runs import SolverSampling
from ovforge_schedulers.solvers import SolverOptions, check_spreads, instead_of

__all__ = ["DPMOptions", "DPMSampling", "Weights", "check_dpm", "usable_timesteps"]


class DPMOptions(SolverOptions):
    """Options of both DPM-Solvers."""

    algorithm_type: Annotated[
        Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"], instead_of({"deis": "dpmsolver++"})
    ] = "dpmsolver++"
    solver_type: Annotated[
        Literal["midpoint", "heun"], instead_of({"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"})
    ] = "midpoint"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float | None = Field(None, description="the log signal-to-noise ratio to begin at; none: all")
    variance_type: str | None = Field(None, description="'learned' or 'learned_range': the network's own is dropped")


def check_dpm(config: DPMOptions) -> None:
    """Raise ConfigError for options that exclude each other."""
    check_spreads(config)
    predicts_noise = not config.algorithm_type.endswith("++")
    if predicts_noise and config.final_sigmas_type == "zero":
        raise refuse(
            config,
            "final_sigmas_type",
            f"algorithm_type {config.algorithm_type!r} cannot end at a noise level of zero",
            "Set final_sigmas_type = 'sigma_min', or algorithm_type = 'dpmsolver++'.",
        )
    if predicts_noise and config.prediction_type == "flow_prediction":
        raise refuse(
            config,
            "algorithm_type",
            f"{config.algorithm_type!r} has no way to predict noise from a flow",
            "Set algorithm_type = 'dpmsolver++'.",
        )


def usable_timesteps(config: DPMOptions, alphas: Array, lambdas: Array) -> int:
    """Return how many timesteps there are above `lambda_min_clipped`."""
    if config.lambda_min_clipped is None:
        return len(alphas)
    return len(alphas) - int(np.searchsorted(lambdas[::-1], np.float32(config.lambda_min_clipped)))


class Weights:
    """Weights of a step of length h in lambda, from level `begin` to level `end`.

    The step is carry * latents + first * D0 + second * D1 + third * D2 + noise * fresh noise, where D0 is a prediction
    and D1, D2 are its derivatives in lambda times h and h**2.
    """

    def __init__(self, run: DPMSampling, begin: int, end: int) -> None:
        self._run = run
        self.h = h = run.lambdas[end] - run.lambdas[begin]
        self._kind = run.config.algorithm_type
        alpha, sigma = run.alpha[end], run.sigma[end]
        of_alpha, of_sigma = alpha / run.alpha[begin], sigma / run.sigma[begin]
        self.noise = np.float32(0)
        match self._kind:
            case "dpmsolver++":
                self.carry, self.first, self._scale = of_sigma, -(alpha * (exp(-h) - ONE)), alpha
            case "dpmsolver":
                self.carry, self.first, self._scale = of_alpha, -(sigma * (exp(h) - ONE)), -sigma
            case "sde-dpmsolver++":
                self.carry, self.first, self._scale = of_sigma * exp(-h), alpha * (ONE - exp(-2 * h)), alpha
                self.noise = sigma * np.sqrt(ONE - exp(-2 * h))
            case _:
                self.carry, self.first, self._scale = of_alpha, -2 * (sigma * (exp(h) - ONE)), -2 * sigma
                self.noise = sigma * np.sqrt(exp(2 * h) - ONE)

    @property
    def half(self) -> Any:
        """The weight of D1 by the midpoint rule."""
        return np.float32(0.5) * self.first

    @property
    def second(self) -> Any:
        """The weight of D1, exact to its order ("heun")."""
        h = self.h
        match self._kind:
            case "dpmsolver++":
                return self._scale * ((exp(-h) - ONE) / h + ONE)
            case "sde-dpmsolver++":
                return self._scale * ((ONE - exp(-2 * h)) / (-2 * h) + ONE)
            case _:
                return self._scale * ((exp(h) - ONE) / h - ONE)

    @property
    def third(self) -> Any:
        """The weight of D2."""
        h, half = self.h, np.float32(0.5)
        match self._kind:
            case "dpmsolver++":
                return -self._scale * ((exp(-h) - ONE + h) / (h * h) - half)
            case "sde-dpmsolver++":
                return self._scale * ((ONE - exp(-2 * h) - 2 * h) / (2 * h * (2 * h)) - half)
            case _:
                return self._scale * ((exp(h) - ONE - h) / (h * h) - half)


class DPMSampling(SolverSampling):
    """One run of a DPM-Solver: predictions of the picture, or of noise."""

    config: DPMOptions

    def predicted(self, output: Array, latents: Array, index: int) -> Array:
        """Return what the algorithm interpolates, a new array."""
        if self.config.algorithm_type.endswith("++"):
            return self.clean(output, latents, index)
        predicted = self.predicted_noise(output, latents, index)
        if self.config.thresholding:
            alpha, sigma = self.alpha[index], self.sigma[index]
            clean = latents - sigma * predicted
            clean /= alpha
            predicted = latents - alpha * thresholded(clean, self.config)
            predicted /= sigma
        return predicted

    def drawn(self, like: Array, rng: RandomStream) -> Array | None:
        """Return the noise that the algorithm adds in a step, if it does."""
        return rng.randn(like.shape) if self.config.algorithm_type.startswith("sde") else None

    def moved(
        self, latents: Array, weights: Weights, terms: list[tuple[np.float32, Array]], noise: Array | None
    ) -> Array:
        """Return carry * latents + the weighted terms + noise."""
        moved: Array = latents * weights.carry
        for weight, term in terms:
            moved += term * weight
        if noise is not None:
            moved += noise * weights.noise
        return moved
