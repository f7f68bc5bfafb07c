"""Runs of the two forms that only these methods take.

A sampler's latents are a mix of picture and noise. Methods differ in how they write it; besides `AlphaSampling`:

- `SigmaSampling`: picture + sigma * noise, scaled down for the network (Karras et al. 2022; Euler and its kin);
- `SolverSampling`: alpha * picture + sigma * noise, both from the ratio of the two (DPM-Solver and its kin).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge_sampling import ONE, Array, log, thresholded

__all__ = ["SigmaSampling", "SolverSampling", "Turns", "scaled"]


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
