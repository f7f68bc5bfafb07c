"""Multistep latent consistency sampling in numpy.

Source of the method: Luo et al., "Latent Consistency Models" (2023), algorithm 3; the numbers are those of
`diffusers.LCMScheduler`, whose option names these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import checked
from ovforge.errors import ConfigError, InputError
from ovforge.stages import RandomStream

__all__ = ["LCMOptions", "LCMSampling", "LCMScheduler"]

Array = NDArray[np.float32]
SIGMA_DATA = 0.5
"""Deviation of the data that the boundary condition assumes (equation 5 of the paper)."""


class LCMOptions(BaseModel):
    """Options of diffusers' LCMScheduler; what is left out comes from the model's scheduler_config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_train_timesteps: int | None = Field(None, ge=1)
    beta_start: float | None = Field(None, gt=0, lt=1)
    beta_end: float | None = Field(None, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    trained_betas: tuple[float, ...] | None = None
    original_inference_steps: int | None = Field(None, ge=1)
    clip_sample: bool | None = None
    clip_sample_range: float | None = Field(None, gt=0)
    set_alpha_to_one: bool | None = None
    steps_offset: int | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    thresholding: bool | None = None
    dynamic_thresholding_ratio: float | None = Field(None, ge=0, le=1)
    sample_max_value: float | None = Field(None, ge=1)
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    timestep_scaling: float | None = Field(None, gt=0)
    rescale_betas_zero_snr: bool | None = None


_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "original_inference_steps": 50,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}

_OF_OTHERS = frozenset(
    [
        "algorithm_type",
        "beta_dist_alpha",
        "clip_denoised",
        "disable_corrector",
        "dynamic_thresholding",
        "eta",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "predict_x0",
        "rho",
        "shift_terminal",
        "sigma_data",
        "sigma_max",
        "sigma_min",
        "sigma_schedule",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "time_shift_type",
        "timestep_type",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    ]
)
"""Keys in configs written for other samplers: they choose how those step, and LCM's class has no such option."""


class LCMScheduler:
    """The schedule of noise and the steps of a model's distillation. Immutable; shared between threads."""

    def __init__(self, options: LCMOptions, model_config: Mapping[str, Any]) -> None:
        config = _merged(options, model_config)
        self.config = config
        betas = _betas(config)
        if config["rescale_betas_zero_snr"]:
            betas = _rescaled_to_zero_snr(betas)
        self.alphas_cumprod: Array = _running_product(np.float32(1) - betas)
        if self.alphas_cumprod[-1] <= 0 and config["prediction_type"] == "epsilon":
            raise ConfigError(
                "rescale_betas_zero_snr with prediction_type 'epsilon' divides by zero at the first step",
                where="scheduler (lcm)",
                hint="Models trained so predict v: set prediction_type = 'v_prediction', or do not rescale.",
            )

    def start(self, steps: int, strength: float = 1.0) -> LCMSampling:
        """Begin a run; raises InputError where the model was distilled for fewer steps.

        With `strength` the steps are spread over that part of the schedule, as diffusers' latent consistency
        image-to-image pipeline does, so that none is lost.
        """
        train, original = self.config["num_train_timesteps"], self.config["original_inference_steps"]
        if original > train:
            raise ConfigError(
                f"original_inference_steps = {original} is more than num_train_timesteps = {train}",
                where="scheduler (lcm)",
            )
        usable = int(original * strength)
        if not 1 <= steps <= usable:
            part = f" with strength = {strength}" if strength < 1 else ""
            raise InputError(
                f"{steps} is out of range for this model{part}",
                where="steps",
                hint=f"Give 1 to {usable}; consistency models need 4 to 8."
                if usable
                else f"strength = {strength} leaves no step of {original}; give more.",
            )
        trained = np.arange(1, usable + 1, dtype=np.int64) * (train // original) - 1
        picked = np.floor(np.linspace(0, usable, num=steps, endpoint=False)).astype(np.int64)
        return LCMSampling(self, trained[::-1][picked])


class LCMSampling:
    """One run. The arrays that `step` returns belong to the caller."""

    init_noise_sigma = 1.0
    first = 0

    def __init__(self, scheduler: LCMScheduler, timesteps: NDArray[np.int64]) -> None:
        self.timesteps = timesteps
        self._config = scheduler.config
        self._alphas = scheduler.alphas_cumprod

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents: this method scales nothing."""
        return latents

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return sqrt(alpha) * original + sqrt(1 - alpha) * noise at the timestep of step `index`."""
        alpha = self._alphas[self.timesteps[index]]
        noised = noise * np.sqrt(np.float32(1) - alpha)
        noised += np.sqrt(alpha) * original
        return noised

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Jump to the clean latents, and back to the noise of the next timestep; the last step stays there."""
        timestep = int(self.timesteps[index])
        denoised = self._denoised(output, timestep, latents)
        if index == len(self.timesteps) - 1:
            return denoised
        following = self._alphas[self.timesteps[index + 1]]
        noise = rng.randn(output.shape)
        noise *= np.sqrt(np.float32(1) - following)
        denoised *= np.sqrt(following)
        denoised += noise
        return denoised

    def _denoised(self, output: Array, timestep: int, latents: Array) -> Array:
        """Return c_out * prediction + c_skip * latents, a new array."""
        # In float32 throughout: diffusers' timestep is a tensor, and so are these.
        scaled = np.float32(timestep) * np.float32(self._config["timestep_scaling"])
        total = scaled * scaled + np.float32(SIGMA_DATA**2)
        skip = np.float32(SIGMA_DATA**2) / total
        out = scaled / np.sqrt(total)
        clean = self._bounded(self._clean(output, timestep, latents))
        clean *= out
        clean += skip * latents
        return clean

    def _clean(self, output: Array, timestep: int, latents: Array) -> Array:
        """Return the prediction of the clean latents, a new array."""
        alpha = np.sqrt(self._alphas[timestep])
        sigma = np.sqrt(np.float32(1) - self._alphas[timestep])
        if self._config["prediction_type"] == "sample":
            return output.astype(np.float32)
        if self._config["prediction_type"] == "v_prediction":
            clean = alpha * latents
            clean -= sigma * output
            return clean
        clean = latents - sigma * output
        clean /= alpha
        return clean

    def _bounded(self, clean: Array) -> Array:
        """Apply dynamic thresholding (Saharia et al. 2022), or clipping, where the config asks for it."""
        if self._config["thresholding"]:
            flat = clean.reshape(len(clean), -1)
            limit = np.quantile(np.abs(flat), self._config["dynamic_thresholding_ratio"], axis=1, keepdims=True)
            limit = np.clip(limit, 1, self._config["sample_max_value"]).astype(np.float32)
            return (np.clip(flat, -limit, limit) / limit).reshape(clean.shape)
        if self._config["clip_sample"]:
            bound = self._config["clip_sample_range"]
            return np.clip(clean, -bound, bound, out=clean)
        return clean


def _merged(options: LCMOptions, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option: the config's over the model's over diffusers' defaults. Refuses what is not known."""
    known = {key: value for key, value in model_config.items() if key in _DEFAULTS}
    for key in model_config:
        if key not in _DEFAULTS and key not in _OF_OTHERS and not key.startswith("_"):
            raise ConfigError(
                f"the option {key!r} is not one of LCM's",
                where="scheduler/scheduler_config.json",
                hint="Remove it if it does not matter, or set scheduler.use = 'diffusers' with"
                " class_name = 'LCMScheduler'.",
            )
    from_model = checked(LCMOptions, known, where="scheduler/scheduler_config.json")
    return {
        **_DEFAULTS,
        **from_model.model_dump(exclude_none=True),
        **options.model_dump(exclude_none=True),
    }


def _betas(config: Mapping[str, Any]) -> Array:
    count, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if (given := config["trained_betas"]) is not None:
        if len(given) != count:
            raise ConfigError(f"{len(given)} trained_betas for num_train_timesteps = {count}", where="scheduler (lcm)")
        return np.array(given, dtype=np.float32)
    if config["beta_schedule"] == "linear":
        return _linspace(start, end, count)
    if config["beta_schedule"] == "scaled_linear":
        return _linspace(start**0.5, end**0.5, count) ** 2
    # "squaredcos_cap_v2": Nichol and Dhariwal 2021, capped where the cosine reaches zero.
    bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)


def _linspace(start: float, end: float, count: int) -> Array:
    """Return `torch.linspace`, to the bit: a float32 step, from both ends to the middle, each sum rounded once.

    Source: PyTorch, aten/src/ATen/native/cpu/RangeFactoriesKernel.cpp (`linspace_kernel`). The last bits matter:
    where alpha is small, a run multiplies their error by 1 / sqrt(alpha).
    """
    low, high = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([low])
    step = np.float64((high - low) / np.float32(count - 1))
    index = np.arange(count)
    from_low, from_high = low + step * index, high - step * (count - 1 - index)
    return np.where(index < count // 2, from_low, from_high).astype(np.float32)


def _running_product(alphas: Array) -> Array:
    """Return `torch.cumprod`, to the bit: it multiplies in float64 and rounds what it stores."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescaled_to_zero_snr(betas: Array) -> Array:
    """Return betas whose last step is pure noise (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(_running_product(np.float32(1) - betas))
    first, last = root[0].copy(), root[-1].copy()
    root = (root - last) * (first / (first - last))
    bar = root**2
    alphas = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return np.float32(1) - alphas
