"""Euler's method, its ancestral form, and that of EDM, in numpy.

Source of the methods: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022),
algorithms 1 and 2, table 1; ancestral steps as in k-diffusion. The numbers are those of diffusers'
EulerDiscreteScheduler, EulerAncestralDiscreteScheduler and EDMEulerScheduler.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge.errors import InputError
from ovforge_sampling import (
    ONE,
    Array,
    BetaSchedule,
    NoiseOptions,
    NoiseScheduler,
    Options,
    Scheduling,
    Spacing,
    SpacingOptions,
    Value,
    exp,
    linspace,
    log,
    takes_none,
)
from ovforge_schedulers.runs import SigmaSampling
from ovforge_schedulers.spacing import (
    Doubles,
    SigmaOptions,
    check_not_spread,
    check_one_spread,
    schedule,
    sigma_table,
    times_of,
)

__all__ = [
    "EDMEulerOptions",
    "EDMEulerSampling",
    "EDMEulerScheduler",
    "EulerAncestralOptions",
    "EulerAncestralSampling",
    "EulerAncestralScheduler",
    "EulerOptions",
    "EulerSampling",
    "EulerScheduler",
]


class EulerOptions(NoiseOptions, SpacingOptions, SigmaOptions):
    """Options of diffusers' EulerDiscreteScheduler."""

    original: ClassVar[str] = "EulerDiscreteScheduler"

    beta_schedule: BetaSchedule = "linear"
    prediction_type: Literal["epsilon", "sample", "original_sample", "v_prediction"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_spacing: Spacing = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class EulerScheduler(NoiseScheduler[EulerOptions]):
    """Straight lines along the predicted noise, from one noise level to the next."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_one_spread(self.config)

    def run(self, steps: int, given: Doubles | None = None) -> EulerSampling:
        """Return a run from the first step on."""
        config, table = self.config, sigma_table(self.alphas_cumprod)
        own: NDArray[Any] | None = None
        if config.interpolation_type == "log_linear":
            own = exp(linspace(float(np.log(table[-1])), float(np.log(table[0])), steps + 1))
        times, sigmas = schedule(config, self.alphas_cumprod, steps, given=given, sigmas=own)
        return self._over(times, ended(sigmas, table[0] if config.final_sigmas_type == "sigma_min" else 0))

    def run_timesteps(self, timesteps: Doubles) -> EulerSampling:
        """Return a run over timesteps of a call."""
        check_not_spread(self.config)
        if self._continuous:
            raise takes_none(self.config, "timesteps", " with timestep_type = 'continuous'")
        return self.run(len(timesteps), timesteps)

    def run_sigmas(self, sigmas: Doubles) -> EulerSampling:
        """Return a run over noise levels of a call, the last of which is where it ends."""
        if len(sigmas) < 2:
            what = f"{self.config.original} takes the level that a run ends at, too"
            raise InputError(what, where="sigmas", hint="Give one more than steps: mostly 0.")
        levels = sigmas.astype(np.float32)
        return self._over(times_of(levels[:-1], self.alphas_cumprod), levels)

    def _over(self, times: NDArray[Any], levels: Array) -> EulerSampling:
        return EulerSampling(np.float32(0.25) * log(levels[:-1]) if self._continuous else times, levels, self.config)

    @property
    def _continuous(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"


class EulerSampling(SigmaSampling):
    """One run of Euler's method."""

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level."""
        sigma = self.sigmas[index]
        moved = self.derivative(output, latents, sigma)
        moved *= self.sigmas[index + 1] - sigma
        moved += latents
        return moved


class EulerAncestralOptions(NoiseOptions, SpacingOptions):
    """Options of diffusers' EulerAncestralDiscreteScheduler."""

    original: ClassVar[str] = "EulerAncestralDiscreteScheduler"

    beta_schedule: BetaSchedule = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "linspace"
    rescale_betas_zero_snr: bool = False


class EulerAncestralScheduler(NoiseScheduler[EulerAncestralOptions]):
    """Euler's method below the next noise level, and back up to it with new noise."""

    def run(self, steps: int) -> EulerAncestralSampling:
        """Return a run from the first step on."""
        times, sigmas = schedule(self.config, self.alphas_cumprod, steps)
        return EulerAncestralSampling(times, ended(sigmas, 0), self.config)


class EulerAncestralSampling(SigmaSampling):
    """One run of Euler's method, ancestral."""

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level."""
        sigma = self.sigmas[index]
        down, up = ancestral(sigma, self.sigmas[index + 1])
        moved = self.derivative(output, latents, sigma)
        moved *= down - sigma
        moved += latents
        moved += rng.randn(output.shape) * up
        return moved


class EDMEulerOptions(Options):
    """Options of diffusers' EDMEulerScheduler."""

    original: ClassVar[str] = "EDMEulerScheduler"

    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = Field(7.0, gt=0)
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class EDMEulerScheduler(Scheduling[EDMEulerOptions]):
    """Euler's method with the preconditioning of EDM, which knows no timesteps of training, only noise levels."""

    def run(self, steps: int) -> EDMEulerSampling:
        """Return a run from the first step on."""
        config = self.config
        if config.sigma_schedule == "karras":
            high, low = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
            sigmas = ((high + np.linspace(0, 1, steps) * (low - high)) ** config.rho).astype(np.float32)
        else:
            sigmas = exp(linspace(math.log(config.sigma_min), math.log(config.sigma_max), steps))[::-1]
        return EDMEulerSampling(ended(sigmas, sigmas[-1] if config.final_sigmas_type == "sigma_min" else 0), config)


class EDMEulerSampling(SigmaSampling):
    """One run of Euler's method for EDM. The timesteps are a quarter of the logarithm of noise levels."""

    def __init__(self, sigmas: Array, config: EDMEulerOptions) -> None:
        self.timesteps: NDArray[Any] = np.float32(0.25) * log(sigmas[:-1])
        self.sigmas = sigmas
        self.init_noise_sigma = (config.sigma_max**2 + 1) ** 0.5
        self._data = np.float32(config.sigma_data)
        self._sign = np.float32(1 if config.prediction_type == "epsilon" else -1)

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return latents / sqrt(sigma**2 + sigma_data**2)."""
        return latents * (ONE / self._total(self.sigmas[index]))

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level."""
        sigma, total = self.sigmas[index], self._total(self.sigmas[index])
        share = self._data / total
        clean = latents * (share * share)
        clean += output * (self._sign * sigma * share)
        moved = latents - clean
        moved *= (self.sigmas[index + 1] - sigma) / sigma
        moved += latents
        return moved

    def _total(self, sigma: np.float32) -> np.float32:
        return np.float32(np.sqrt(sigma * sigma + self._data * self._data))


def ended(sigmas: NDArray[Any], last: Any) -> Array:
    """Return noise levels with the one that a run ends at."""
    return np.append(sigmas, last).astype(np.float32)


def ancestral(sigma: Value, following: Value) -> tuple[Value, Value]:
    """Return the level to step down to and the noise to add, so that together they make `following`."""
    up = np.sqrt(following * following * (sigma * sigma - following * following) / (sigma * sigma))
    # Where `following` is far below `sigma` nearly all is noise, and rounding may leave less than nothing.
    return np.sqrt(np.maximum(following * following - up * up, 0)), up
