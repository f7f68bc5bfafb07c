"""DDIM and DDPM in numpy.

Sources: Song et al., "Denoising Diffusion Implicit Models" (2021), equations 12 and 16; Ho et al., "Denoising Diffusion
Probabilistic Models" (2020), equations 6 and 7; Nichol and Dhariwal 2021 (learned variances).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge.errors import InputError
from ovforge_sampling import (
    ONE,
    AlphaSampling,
    Array,
    BetaSchedule,
    BoundOptions,
    NoiseOptions,
    NoiseScheduler,
    Prediction,
    SpacingOptions,
    bounded,
    exp,
    log,
    predicted_noise,
    predicted_picture,
    refuse,
    whole,
)
from ovforge_schedulers.spacing import in_range, spaced

__all__ = ["DDIMOptions", "DDIMSampling", "DDIMScheduler", "DDPMOptions", "DDPMSampling", "DDPMScheduler"]


class DDIMOptions(NoiseOptions, SpacingOptions, BoundOptions):
    """Options of diffusers' DDIMScheduler, and `eta`."""

    original: ClassVar[str] = "DDIMScheduler"
    ours: ClassVar[frozenset[str]] = frozenset(["eta"])

    beta_schedule: BetaSchedule = "linear"
    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False
    eta: float = Field(0.0, ge=0, le=1, description="how much noise each step adds: 0 none, 1 as DDPM")


class DDIMScheduler(NoiseScheduler[DDIMOptions]):
    """DDIM: no noise is added unless `eta` says so."""

    divides_by_alpha = False

    def run(self, steps: int) -> DDIMSampling:
        """Return a run from the first step on."""
        return DDIMSampling(self, steps, rounded(self.config, self.alphas_cumprod, steps))


class DDIMSampling(AlphaSampling):
    """One run of DDIM."""

    def __init__(self, scheduler: DDIMScheduler, steps: int, timesteps: NDArray[np.int64]) -> None:
        super().__init__(timesteps, scheduler.alphas_cumprod)
        self._config = scheduler.config
        self._stride = scheduler.config.num_train_timesteps // steps
        self._final = ONE if scheduler.config.set_alpha_to_one else self.alphas[0]

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents a stride of timesteps earlier."""
        timestep = int(self.timesteps[index])
        earlier = timestep - self._stride
        alpha, following = self.alphas[timestep], self.alphas[earlier] if earlier >= 0 else self._final
        predicted = predicted_noise(self._config.prediction_type, output, latents, alpha)
        clean = bounded(predicted_picture(self._config.prediction_type, output, latents, alpha), self._config)
        variance = (ONE - following) / (ONE - alpha) * (ONE - alpha / following)
        deviation = np.float32(self._config.eta) * np.sqrt(variance)
        clean *= np.sqrt(following)
        # With eta = 1 all noise may be new, and rounding leave less than none of the old.
        clean += predicted * np.sqrt(np.maximum(ONE - following - deviation * deviation, 0))
        if self._config.eta > 0:
            clean += rng.randn(output.shape) * deviation
        return clean


class DDPMOptions(NoiseOptions, SpacingOptions, BoundOptions):
    """Options of diffusers' DDPMScheduler."""

    original: ClassVar[str] = "DDPMScheduler"

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear"
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    ) = "fixed_small"
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False


class DDPMScheduler(NoiseScheduler[DDPMOptions]):
    """DDPM: each step adds as much noise as it takes away, but for the last."""

    divides_by_alpha = False

    def check(self) -> None:
        """Raise ConfigError for the one variance that diffusers itself makes NaN of."""
        if self.config.variance_type == "fixed_large_log":
            raise refuse(
                self.config,
                "variance_type",
                "'fixed_large_log' takes the square root of a logarithm below zero",
                "Set variance_type = 'fixed_large'.",
            )

    def run(self, steps: int) -> DDPMSampling:
        """Return a run from the first step on."""
        return DDPMSampling(rounded(self.config, self.alphas_cumprod, steps), self.alphas_cumprod, self.config)

    def run_timesteps(self, timesteps: NDArray[np.float64]) -> DDPMSampling:
        """Return a run over timesteps of a call."""
        times = whole(timesteps, self.config)
        check_first(self.config, self.alphas_cumprod, times)
        return DDPMSampling(times, self.alphas_cumprod, self.config)


class DDPMSampling(AlphaSampling):
    """One run of DDPM."""

    def __init__(self, timesteps: NDArray[np.int64], alphas: Array, config: DDPMOptions) -> None:
        super().__init__(timesteps, alphas)
        self._config = config

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next timestep; `output` may have twice the channels, with a learned variance."""
        output, learned = self._split(output, latents)
        timestep = int(self.timesteps[index])
        last = index + 1 == len(self.timesteps)
        alpha, following = self.alphas[timestep], ONE if last else self.alphas[self.timesteps[index + 1]]
        kept = alpha / following
        clean = bounded(predicted_picture(self._config.prediction_type, output, latents, alpha), self._config)
        clean *= np.sqrt(following) * (ONE - kept) / (ONE - alpha)
        clean += latents * (np.sqrt(kept) * (ONE - following) / (ONE - alpha))
        if timestep > 0:
            noise = rng.randn(output.shape)
            noise *= self._deviation(alpha, following, ONE - kept, learned)
            clean += noise
        return clean

    def _split(self, output: Array, latents: Array) -> tuple[Array, Array | None]:
        if self._config.variance_type not in ("learned", "learned_range"):
            return output, None
        channels = latents.shape[1]
        if output.shape[1] != 2 * channels:
            raise InputError(
                f"the network has {output.shape[1]} output channels for {channels} of latents: it learned no variance",
                where="scheduler.variance_type",
                hint="Set variance_type = 'fixed_small'.",
            )
        return output[:, :channels], output[:, channels:]

    def _deviation(self, alpha: np.float32, following: np.float32, beta: np.float32, learned: Array | None) -> Any:
        variance = np.maximum((ONE - following) / (ONE - alpha) * beta, np.float32(1e-20))
        match self._config.variance_type:
            case "fixed_small" | None:  # None: the config is of a sampler that knows learned ones alone
                return np.sqrt(variance)
            case "fixed_small_log":
                return exp(np.float32(0.5) * log(variance))
            case "fixed_large":
                return np.sqrt(beta)
        assert learned is not None
        if self._config.variance_type == "learned":
            return np.sqrt(learned)
        share = (learned + ONE) / 2
        return np.exp((share * log(beta) + (ONE - share) * log(variance)) / 2)


def rounded(config: Any, alphas: Array, steps: int) -> NDArray[np.int64]:
    """Return the whole timesteps of a run; raises InputError if they leave training's, or where alpha is zero."""
    train = config.num_train_timesteps
    times = spaced(config.timestep_spacing, train, steps, config.steps_offset)
    timesteps = times.round().astype(np.int64)
    in_range(timesteps, train, steps)
    check_first(config, alphas, timesteps)
    return timesteps


def check_first(config: Any, alphas: Array, timesteps: NDArray[np.int64]) -> None:
    """Raise ConfigError if nothing is left of the picture at the first step, and the method divides by it."""
    if config.prediction_type == "epsilon" and alphas[timesteps[0]] <= 0:
        raise refuse(
            config,
            "rescale_betas_zero_snr",
            "with prediction_type 'epsilon' and this spacing it divides by zero at the first step",
            "Models trained so predict v: set prediction_type = 'v_prediction', or do not rescale.",
        )
