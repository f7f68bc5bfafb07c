"""What schedulers have in common: options, the schedule of noise, where a run begins; and runs of the three forms.

A sampler's latents are a mix of picture and noise. Methods differ in how they write it:

- `AlphaSampling`: sqrt(alpha) * picture + sqrt(1 - alpha) * noise, alpha from the timestep (DDIM and its kin);
- `SigmaSampling`: picture + sigma * noise, scaled down for the network (Karras et al. 2022; Euler and its kin);
- `SolverSampling`: alpha * picture + sigma * noise, both from the ratio of the two (DPM-Solver and its kin).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import RandomStream
from ovforge.errors import InputError
from ovforge_schedulers import noise
from ovforge_schedulers.float32 import Array, log
from ovforge_schedulers.options import BoundOptions, NoiseOptions, Options, ThresholdOptions, merged, refuse

__all__ = [
    "AlphaSampling",
    "NoiseScheduler",
    "Scheduling",
    "SigmaSampling",
    "SolverSampling",
    "Turns",
    "bounded",
    "predicted_noise",
    "predicted_picture",
    "scaled",
    "thresholded",
]

Config = TypeVar("Config", bound=Options)
Noisy = TypeVar("Noisy", bound=NoiseOptions)
ONE = np.float32(1)


class Run(Protocol):
    """A Sampling whose first step can be set."""

    timesteps: NDArray[Any]
    init_noise_sigma: float
    first: int

    def scale_input(self, latents: Array, index: int) -> Array: ...
    def add_noise(self, original: Array, noise: Array, index: int) -> Array: ...
    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array: ...


class Scheduling(Generic[Config]):
    """A method with its options. Immutable; shared between threads."""

    order: ClassVar[int] = 1
    """How often the network is called for one step; image-to-image counts its start in steps."""

    def __init__(self, options: Config, model_config: Mapping[str, Any]) -> None:
        self.config: Config = merged(options, model_config)

    def start(self, steps: int, strength: float = 1.0) -> Run:
        """Begin a run. Raises InputError where the schedule has no such number of steps, or `strength` leaves none.

        With `strength` a run begins later, as in diffusers' image-to-image pipelines.
        """
        train = self.config.num_train_timesteps
        if not 1 <= steps <= train:
            raise InputError(f"{steps} is out of range", where="steps", hint=f"Give 1 to {train}.")
        run = self.run(steps)
        run.first = (steps - min(int(steps * strength), steps)) * self.order
        if run.first >= len(run.timesteps):
            raise InputError(
                f"{strength} of {steps} steps is less than one", where="strength", hint="Give more of either."
            )
        return run

    def run(self, steps: int) -> Run:
        """Return a run from the first step on."""
        raise NotImplementedError


class NoiseScheduler(Scheduling[Noisy]):
    """A method for networks that were trained on a schedule of noise."""

    divides_by_alpha: ClassVar[bool] = True
    """Whether a last alpha of zero must be kept off, as diffusers does."""

    def __init__(self, options: Noisy, model_config: Mapping[str, Any]) -> None:
        super().__init__(options, model_config)
        self.alphas_cumprod: Array = noise.alphas_cumprod(
            self.config,
            zero_snr=getattr(self.config, "rescale_betas_zero_snr", False),
            never_zero=self.divides_by_alpha,
        )
        if self.divides_by_alpha and self.alphas_cumprod[-1] <= 0:
            what = "trained_betas that leave nothing of the picture: this method divides by what is left"
            raise refuse(self.config, "trained_betas", what)
        self.check()

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""


class Turns:
    """Says where a run stands, for methods that look back: a step out of order would mix up their history."""

    def __init__(self) -> None:
        self._begun: int | None = None
        self._next = 0

    def take(self, index: int) -> int:
        """Return how many steps there were, now that step `index` is taken. Raises ValueError if another is due."""
        if self._begun is None:
            self._begun = self._next = index
        elif index != self._next:
            raise ValueError(f"step {index} where {self._next} is due: a run goes in order; start another")
        self._next += 1
        return index - self._begun


class AlphaSampling:
    """A run in terms of alphas. The arrays that `step` returns belong to the caller."""

    init_noise_sigma = 1.0
    first = 0

    def __init__(self, timesteps: NDArray[np.int64], alphas: Array) -> None:
        self.timesteps = timesteps
        self.alphas = alphas

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents: these methods scale nothing."""
        return latents

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return sqrt(alpha) * original + sqrt(1 - alpha) * noise at the timestep of step `index`."""
        alpha = self.alphas[self.timesteps[index]]
        noised: Array = noise * np.sqrt(ONE - alpha)
        noised += np.sqrt(alpha) * original
        return noised


def predicted_picture(prediction: str, output: Array, latents: Array, alpha: np.float32) -> Array:
    """Return the picture that a network's output stands for, a new array."""
    if prediction == "sample":
        return output.astype(np.float32)
    keep, part = np.sqrt(alpha), np.sqrt(ONE - alpha)
    if prediction == "epsilon":
        picture: Array = latents - part * output
        picture /= keep
        return picture
    picture = keep * latents
    picture -= part * output
    return picture


def predicted_noise(prediction: str, output: Array, latents: Array, alpha: np.float32) -> Array:
    """Return the noise that a network's output stands for: `output` itself, or a new array."""
    if prediction == "epsilon":
        return output
    keep, part = np.sqrt(alpha), np.sqrt(ONE - alpha)
    if prediction == "sample":
        predicted: Array = latents - keep * output
        predicted /= part
        return predicted
    predicted = keep * output
    predicted += part * latents
    return predicted


class SigmaSampling:
    """A run in terms of sigmas, shape (steps + 1,) or more. The arrays that `step` returns belong to the caller."""

    first = 0

    def __init__(self, timesteps: NDArray[Any], sigmas: Array, config: Any) -> None:
        self.timesteps = timesteps.astype(np.float32)
        self.sigmas = sigmas
        highest = sigmas.max()
        self.init_noise_sigma = float(
            np.sqrt(highest * highest + ONE) if config.timestep_spacing == "leading" else highest
        )
        self._prediction = config.prediction_type

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return latents of about unit variance."""
        return scaled(latents, self.sigmas[index])

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return original + sigma * noise."""
        noised: Array = noise * self.sigmas[index]
        noised += original
        return noised

    def derivative(self, output: Array, latents: Array, sigma: np.float32) -> Array:
        """Return d latents / d sigma, that is, the predicted noise; a new array.

        By way of the picture even where the network predicts noise: methods that look ahead have latents far noisier
        than `sigma`, and what is rounded off then is part of diffusers' numbers.
        """
        clean = self.clean(output, latents, sigma)
        np.subtract(latents, clean, out=clean)
        clean /= sigma
        return clean

    def clean(self, output: Array, latents: Array, sigma: np.float32) -> Array:
        """Return the predicted picture, a new array."""
        if self._prediction == "epsilon":
            clean: Array = output * -sigma
            clean += latents
            return clean
        if self._prediction == "v_prediction":
            total = sigma * sigma + ONE
            clean = output * (-sigma / np.sqrt(total))
            clean += latents / total
            return clean
        return output.astype(np.float32)


def scaled(latents: Array, sigma: np.float32) -> Array:
    """Return latents / sqrt(sigma**2 + 1)."""
    result: Array = latents * (ONE / np.sqrt(sigma * sigma + ONE))
    return result


class SolverSampling:
    """A run in terms of the log ratio of picture to noise. The arrays that `step` returns belong to the caller."""

    init_noise_sigma = 1.0
    first = 0

    def __init__(self, timesteps: NDArray[np.int64], sigmas: Array, config: Any) -> None:
        self.timesteps = timesteps
        self.config = config
        self.sigmas = sigmas
        # Flows go in a straight line from picture to noise, diffusion keeps the variance.
        self.alpha = ONE - sigmas if config.use_flow_sigmas else ONE / np.sqrt(sigmas**2 + ONE)
        self.sigma = sigmas if config.use_flow_sigmas else sigmas * self.alpha
        self.lambdas: Array = log(self.alpha) - log(self.sigma)
        self.turns = Turns()

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents: these methods scale nothing."""
        return latents

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return alpha * original + sigma * noise."""
        noised: Array = noise * self.sigma[index]
        noised += self.alpha[index] * original
        return noised

    def clean(self, output: Array, latents: Array, index: int) -> Array:
        """Return the predicted picture, thresholded if the config says so; a new array."""
        alpha, sigma = self.alpha[index], self.sigma[index]
        match self.config.prediction_type:
            case "epsilon":
                clean = latents - sigma * self.seen(output)
                clean /= alpha
            case "sample":
                clean = output.astype(np.float32)
            case "v_prediction":
                clean = alpha * latents
                clean -= sigma * output
            case _:
                clean = latents - self.sigmas[index] * output
        return thresholded(clean, self.config) if self.config.thresholding else clean

    def predicted_noise(self, output: Array, latents: Array, index: int) -> Array:
        """Return the predicted noise, a new array."""
        alpha, sigma = self.alpha[index], self.sigma[index]
        if self.config.prediction_type == "epsilon":
            return self.seen(output).copy()
        if self.config.prediction_type == "v_prediction":
            predicted: Array = alpha * output
            predicted += sigma * latents
            return predicted
        predicted = latents - alpha * output
        predicted /= sigma
        return predicted

    def seen(self, output: Array) -> Array:
        """Return the part of a network's output that predicts noise: it may have learnt a variance, too."""
        return output[:, :3] if getattr(self.config, "variance_type", None) in ("learned", "learned_range") else output


def thresholded(clean: Array, config: ThresholdOptions) -> Array:
    """Return pictures cut at a quantile of their own, and scaled to 1 (Saharia et al. 2022)."""
    flat = clean.reshape(len(clean), -1)
    limit = np.quantile(np.abs(flat), config.dynamic_thresholding_ratio, axis=1, keepdims=True)
    limit = np.clip(limit, 1, config.sample_max_value).astype(np.float32)
    result: Array = (np.clip(flat, -limit, limit) / limit).reshape(clean.shape)
    return result


def bounded(clean: Array, config: BoundOptions) -> Array:
    """Apply dynamic thresholding, or clipping, where the config asks for it; may change `clean` in place."""
    if config.thresholding:
        return thresholded(clean, config)
    if config.clip_sample:
        return np.clip(clean, -config.clip_sample_range, config.clip_sample_range, out=clean)
    return clean
