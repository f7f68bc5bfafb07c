"""Noise schedules: how much of the picture is left at each timestep of training.

Sources: Ho et al. 2020 (linear betas), Rombach et al. 2022 (scaled linear), Nichol and Dhariwal 2021 (squared cosine),
Lin et al. 2024 (zero terminal signal-to-noise ratio). Numbers are those of diffusers, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ovforge.errors import ConfigError
from ovforge_sampling.float32 import Array, exp, linspace, running_product

if TYPE_CHECKING:
    from ovforge_sampling.options import NoiseOptions

__all__ = ["alphas_cumprod"]

TINY = np.float32(2**-24)
"""What methods that divide by alpha take for a last alpha of zero, as diffusers does."""


def alphas_cumprod(config: NoiseOptions, *, zero_snr: bool = False, never_zero: bool = False) -> Array:
    """Return the running product of 1 - beta, float32, shape (num_train_timesteps,).

    `zero_snr` makes the last one 0, or 2**-24 with `never_zero`. Raises ConfigError for trained_betas of another
    length.
    """
    betas = _betas(config)
    if zero_snr:
        betas = _rescaled_to_zero_snr(betas)
    product = running_product(np.float32(1) - betas)
    if zero_snr and never_zero:
        product[-1] = TINY
    return product


def _betas(config: NoiseOptions) -> Array:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        if len(config.trained_betas) != count:
            raise ConfigError(
                f"{len(config.trained_betas)} trained_betas for num_train_timesteps = {count}",
                where="scheduler.trained_betas",
                hint="Give one for each timestep of training.",
            )
        return np.array(config.trained_betas, dtype=np.float32)
    match config.beta_schedule:
        case "linear":
            return linspace(start, end, count)
        case "scaled_linear":
            return linspace(start**0.5, end**0.5, count) ** 2
        case "sigmoid":
            sigmoid = np.float32(1) / (np.float32(1) + exp(-linspace(-6, 6, count)))
            scaled: Array = sigmoid * np.float32(end - start) + np.float32(start)
            return scaled
        case "exp":
            return _from_alpha_bar(lambda time: math.exp(time * -12.0), count)
        case "laplace":
            return _from_alpha_bar(_laplace, count)
        case _:
            return _from_alpha_bar(lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2, count)


def _from_alpha_bar(alpha_bar: Callable[[float], float], count: int) -> Array:
    """Return the betas whose running product follows `alpha_bar`, a function of time from 0 to 1; at most 0.999."""
    bars = [alpha_bar(index / count) for index in range(count + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in pairwise(bars)], np.float32)


def _laplace(time: float) -> float:
    ratio = math.exp(-0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * math.fabs(0.5 - time) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


def _rescaled_to_zero_snr(betas: Array) -> Array:
    """Return betas whose last step is pure noise (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(running_product(np.float32(1) - betas))
    first, last = root[0].copy(), root[-1].copy()
    root = (root - last) * (first / (first - last))
    bar = root**2
    with np.errstate(invalid="ignore"):  # the schedulers refuse betas that leave nothing
        alphas = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return np.float32(1) - alphas
