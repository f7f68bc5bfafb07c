"""What schedulers have in common: options, the schedule of noise, where a run begins; and runs in terms of alphas.

Latents of such a run are sqrt(alpha) * picture + sqrt(1 - alpha) * noise, alpha from the timestep: DDIM and its kin,
and models that were distilled to few steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import FlowRun, RandomStream
from ovforge.errors import ConfigError, InputError
from ovforge_sampling import noise
from ovforge_sampling.float32 import Array
from ovforge_sampling.options import BoundOptions, NoiseOptions, Options, ThresholdOptions, merged, refuse

__all__ = [
    "ONE",
    "AlphaSampling",
    "NoiseScheduler",
    "Run",
    "Scheduling",
    "begun",
    "bounded",
    "predicted_noise",
    "predicted_picture",
    "takes_none",
    "thresholded",
    "whole",
]

Config = TypeVar("Config", bound=Options)
Noisy = TypeVar("Noisy", bound=NoiseOptions)
Numbers = NDArray[np.float64]
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

    own_sigmas: bool = False
    """Whether the options spread a flow's sigmas: see `ovforge.contracts.FlowScheduler`."""

    def __init__(self, options: Config, model_config: Mapping[str, Any]) -> None:
        self.config: Config = merged(options, model_config)

    def start(self, steps: int, strength: float = 1.0) -> Run:
        """Begin a run. Raises InputError if the schedule has no such number of steps, or `strength` leaves none.

        With `strength` a run begins later, as in diffusers' image-to-image pipelines.
        """
        self.check_steps(steps)
        return begun(self.run(steps), (steps - min(int(steps * strength), steps)) * self.order, steps, strength)

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> Run:
        """Refuse: methods for diffusion do not sample flows. Those that do have a method of their own."""
        raise ConfigError(
            f"the model is a flow, and {self.config.original} samples diffusion",
            where="scheduler.use",
            hint="Leave it out for the model's own, or choose one for flows, such as 'flow-euler'.",
        )

    def start_given(
        self, strength: float = 1.0, *, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> Run:
        """Begin a run over the timesteps or noise levels of a call. Raises InputError if the method takes none."""
        if timesteps is not None:
            run = self.run_timesteps(falling(timesteps, "timesteps", self.config.num_train_timesteps - 1))
        else:
            run = self.run_sigmas(falling(() if sigmas is None else sigmas, "sigmas"))
        steps = len(run.timesteps)  # diffusers' pipelines count calls of the network here, of two calls a step, too
        return begun(run, (steps - min(int(steps * strength), steps)) * self.order, steps, strength)

    def run_timesteps(self, timesteps: Numbers) -> Run:
        """Return a run over timesteps of a call."""
        raise takes_none(self.config, "timesteps")

    def run_sigmas(self, sigmas: Numbers) -> Run:
        """Return a run over noise levels of a call."""
        raise takes_none(self.config, "sigmas")

    def check_steps(self, steps: int) -> None:
        """Raise InputError for a number of steps that no schedule has."""
        train = self.config.num_train_timesteps
        if not 1 <= steps <= train:
            raise InputError(f"{steps} is out of range", where="steps", hint=f"Give 1 to {train}.")

    def run(self, steps: int) -> Run:
        """Return a run from the first step on."""
        raise NotImplementedError


def falling(numbers: Sequence[float], name: str, highest: float = math.inf) -> Numbers:
    """Return what a call gives of a schedule, float64. Raises InputError for numbers that do not fall to 0 at most."""
    array = np.asarray(numbers, np.float64)
    if array.ndim != 1 or not array.size:
        raise InputError("there are none", where=name, hint="Give a list of numbers, or leave it out.")
    if not 0 <= array[-1] <= array[0] <= highest or np.any(np.diff(array) >= 0):
        most = "" if highest == math.inf else f" from {highest:g} at most"
        raise InputError("they do not fall", where=name, hint=f"Give numbers that fall{most}, and end at 0 or above.")
    return array


def whole(numbers: Numbers, config: Options) -> NDArray[np.int64]:
    """Return timesteps of a call as whole numbers. Raises InputError for others."""
    if (numbers % 1).any():
        what = f"{config.original} takes whole timesteps"
        raise InputError(what, where="timesteps", hint="Round them.")
    return numbers.astype(np.int64)


def takes_none(config: Options, name: str, why: str = "") -> InputError:
    """Return the error for timesteps or noise levels of a call, or of a model's pipeline, that a method cannot take."""
    return InputError(
        f"{config.original} takes no {name}{why or ' but its own'}, and the call, or the model's pipeline, gives some",
        where=name,
        hint="Leave them out of the call, or choose a scheduler that takes them: 'euler', and 'flow-euler' for flows.",
    )


def begun(run: Run, first: int, steps: int, strength: float) -> Run:
    """Return the run, to begin with step `first`. Raises InputError if that is behind its last."""
    run.first = first
    if first >= len(run.timesteps):
        raise InputError(f"{strength} of {steps} steps is less than one", where="strength", hint="Give more of either.")
    return run


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
        if self.divides_by_alpha and not self.alphas_cumprod.min() >= np.finfo(np.float32).tiny:  # or NaN
            option = "beta_end" if self.config.trained_betas is None else "trained_betas"
            what = f"{option} leaves nothing of the picture in the end, and this method divides by what is left"
            raise refuse(self.config, option, what, "Give smaller ones.")
        self.check()

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""


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
