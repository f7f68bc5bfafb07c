"""The scheduler itself: Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12 without noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ovforge.contracts import RandomStream
from ovforge.errors import ConfigError, InputError
from pydantic import BaseModel, ConfigDict, Field

Array = NDArray[np.float32]


class Options(BaseModel):
    """What a config may say. A misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps_offset: int = Field(1, ge=0, le=1, description="What is added to every timestep.")


class Scheduler:
    """The noise schedule. It never changes, so pipelines and threads share it."""

    def __init__(self, options: Options, model_config: Mapping[str, Any]) -> None:
        prediction = model_config.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            raise ConfigError(
                f"the model predicts {prediction!r}, and this scheduler knows only 'epsilon'",
                where="scheduler (my-plugin)",
                hint="Choose another scheduler.",
            )
        self.offset = options.steps_offset
        self.trained = int(model_config.get("num_train_timesteps", 1000))
        start, end = float(model_config.get("beta_start", 0.00085)), float(model_config.get("beta_end", 0.012))
        betas = np.linspace(np.sqrt(start), np.sqrt(end), self.trained) ** 2
        self.alphas = np.cumprod(1 - betas).astype(np.float32)
        """How much of the picture is left at each timestep of the training, as a share of its variance."""

    def start(self, steps: int, strength: float = 1.0) -> Run:
        """Begin a run. With `strength` below 1, it goes only that part of the way, from a noised picture."""
        if not 1 <= steps <= self.trained - self.offset:
            raise InputError(
                f"{steps} steps are not possible", where="steps", hint=f"1 to {self.trained - self.offset}."
            )
        first = steps - max(1, min(int(steps * strength), steps))
        return Run(self, steps, first)


class Run:
    """One run. There is no hidden step index: the caller says at which step it is."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Scheduler, steps: int, first: int) -> None:
        self._scheduler, self._stride = scheduler, scheduler.trained // steps
        self.first = first
        self.timesteps = np.arange(steps, dtype=np.int64)[::-1] * self._stride + scheduler.offset

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return what the network sees: for this method, the latents themselves."""
        return latents

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return clean latents with the noise of step `index`."""
        alpha = self._alpha(int(self.timesteps[index]))
        noised: Array = np.sqrt(alpha) * original + np.sqrt(1 - alpha) * noise
        return noised

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents after step `index`; `output` is the noise that the network sees in them."""
        timestep = int(self.timesteps[index])
        now, then = self._alpha(timestep), self._alpha(timestep - self._stride)
        clean = (latents - np.sqrt(1 - now) * output) / np.sqrt(now)
        following: Array = np.sqrt(then) * clean + np.sqrt(1 - then) * output
        return following

    def _alpha(self, timestep: int) -> np.float32:
        """Return the share at a timestep, that of the first one before it."""
        return np.float32(self._scheduler.alphas[max(timestep, 0)])
