"""Multistep latent consistency sampling in numpy.

Source of the method: Luo et al., "Latent Consistency Models" (2023), algorithm 3; the numbers are those of
`diffusers.LCMScheduler`, whose option names these are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.contracts import RandomStream
from ovforge.errors import ConfigError, InputError
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
    predicted_picture,
    refuse,
    whole,
)

__all__ = ["DistilledOptions", "LCMOptions", "LCMSampling", "LCMScheduler", "check_distilled", "distilled"]

SIGMA_DATA = 0.5
"""Deviation of the data that the boundary condition assumes (equation 5 of the paper)."""


class DistilledOptions(NoiseOptions, SpacingOptions, BoundOptions):
    """Options of models distilled to few steps. Timesteps are those of the distillation, whatever the spacing says."""

    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: BetaSchedule = "scaled_linear"
    original_inference_steps: int = Field(50, ge=1)
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    timestep_scaling: float = Field(10.0, gt=0)
    rescale_betas_zero_snr: bool = False


class LCMOptions(DistilledOptions):
    """Options of diffusers' LCMScheduler; what is left out comes from the model's scheduler_config.json."""

    original: ClassVar[str] = "LCMScheduler"


class LCMScheduler(NoiseScheduler[LCMOptions]):
    """The schedule of noise and the steps of a model's distillation. Immutable; shared between threads."""

    divides_by_alpha = False
    spreads_steps: ClassVar[bool] = True
    """`start` spreads the steps over a part of the schedule, where other methods leave their first steps out."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_distilled(self.config, self.alphas_cumprod)

    def start(self, steps: int, strength: float = 1.0) -> LCMSampling:
        """Begin a run; raises InputError if the model was distilled for fewer steps.

        With `strength` the steps are spread over that part of the schedule, as diffusers' latent consistency
        image-to-image pipeline does, so that none is lost.
        """
        return LCMSampling(distilled(self.config, steps, strength), self.alphas_cumprod, self.config)

    def run_timesteps(self, timesteps: NDArray[np.float64]) -> LCMSampling:
        """Return a run over timesteps of a call, whether or not the model was distilled at them."""
        return LCMSampling(whole(timesteps, self.config), self.alphas_cumprod, self.config)


class LCMSampling(AlphaSampling):
    """One run. The arrays that `step` returns belong to the caller."""

    def __init__(self, timesteps: NDArray[np.int64], alphas: Array, config: LCMOptions) -> None:
        super().__init__(timesteps, alphas)
        self._config = config

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Jump to the clean latents, and back to the noise of the next timestep; the last step stays there."""
        denoised = self._denoised(output, int(self.timesteps[index]), latents)
        if index == len(self.timesteps) - 1:
            return denoised
        following = self.alphas[self.timesteps[index + 1]]
        noise = rng.randn(output.shape)
        noise *= np.sqrt(ONE - following)
        denoised *= np.sqrt(following)
        denoised += noise
        return denoised

    def _denoised(self, output: Array, timestep: int, latents: Array) -> Array:
        """Return c_out * prediction + c_skip * latents, a new array."""
        # In float32 throughout: diffusers' timestep is a tensor, and so are these.
        scaled = np.float32(timestep) * np.float32(self._config.timestep_scaling)
        total = scaled * scaled + np.float32(SIGMA_DATA**2)
        skip = np.float32(SIGMA_DATA**2) / total
        out = scaled / np.sqrt(total)
        alpha = self.alphas[timestep]
        clean = bounded(predicted_picture(self._config.prediction_type, output, latents, alpha), self._config)
        clean *= out
        clean += skip * latents
        return clean


def check_distilled(config: DistilledOptions, alphas: Array) -> None:
    """Raise ConfigError for options of a distilled model that exclude each other."""
    if config.original_inference_steps > config.num_train_timesteps:
        raise ConfigError(
            f"original_inference_steps = {config.original_inference_steps} is more than"
            f" num_train_timesteps = {config.num_train_timesteps}",
            where="scheduler.original_inference_steps",
            hint="Set the number of steps that the model was distilled with; most have 50.",
        )
    if alphas[-1] <= 0 and config.prediction_type == "epsilon":
        raise refuse(
            config,
            "rescale_betas_zero_snr",
            "with prediction_type 'epsilon' it divides by zero at the first step",
            "Models trained so predict v: set prediction_type = 'v_prediction', or do not rescale.",
        )


def distilled(config: Any, steps: int, strength: float = 1.0) -> NDArray[np.int64]:
    """Return `steps` of the timesteps that a model was distilled at, the latest first."""
    usable = int(config.original_inference_steps * strength)
    if not 1 <= steps <= usable:
        part = f" with strength = {strength}" if strength < 1 else ""
        raise InputError(
            f"{steps} is out of range for this model{part}",
            where="steps",
            hint=f"Give 1 to {usable}; consistency models need 4 to 8."
            if usable
            else f"strength = {strength} leaves no step of {config.original_inference_steps}; give more.",
        )
    stride = config.num_train_timesteps // config.original_inference_steps
    trained = np.arange(1, usable + 1, dtype=np.int64) * stride - 1
    picked = np.floor(np.linspace(0, usable, num=steps, endpoint=False)).astype(np.int64)
    timesteps: NDArray[np.int64] = trained[::-1][picked]
    return timesteps
