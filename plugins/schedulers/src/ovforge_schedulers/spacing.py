"""Which timesteps a run visits, and how much noise is left at each.

Sources: Karras et al. 2022, equation 5; Lu et al. 2022 (steps of equal log signal-to-noise ratio, "lu"); Lee et al.
2024 (beta); Lin et al. 2024, table 2 (leading, linspace, trailing). Numbers are those of diffusers.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovforge.errors import InputError
from ovforge_sampling import Array, Options, refuse, takes_none
from ovforge_schedulers.beta import symmetric_beta_quantile

__all__ = [
    "Doubles",
    "SigmaOptions",
    "check_not_spread",
    "check_one_spread",
    "in_range",
    "interpolated",
    "schedule",
    "sigma_table",
    "spaced",
    "spaced_before_end",
    "spread",
    "spread_evenly",
    "times_of",
]

Doubles = NDArray[np.float64]
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class SigmaOptions(Options):
    """How a run's noise levels are spread; one of the three at most, else as the timesteps are."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = Field(None, gt=0)
    sigma_max: float | None = Field(None, gt=0)

    def without_ends(self) -> Self:
        """Return these without ends of their own: two of diffusers' classes do not know them for Karras's spread."""
        return self.model_copy(update={"sigma_min": None, "sigma_max": None})


def sigma_table(alphas: Array) -> Array:
    """Return sqrt((1 - alpha) / alpha): the noise of each timestep for a picture of unit scale, float32."""
    table: Array = np.sqrt((np.float32(1) - alphas) / alphas)
    return table


def spaced(spacing: str, train: int, steps: int, offset: int = 0) -> Doubles:
    """Return timesteps from late to early, float64; `linspace` is left unrounded."""
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps)[::-1].copy()
    if spacing == "leading":
        return (np.arange(steps) * (train // steps))[::-1].astype(np.float64) + offset
    return np.arange(train, 0, -train / steps).round() - 1


def spaced_before_end(spacing: str, last: int, train: int, steps: int, offset: int = 0) -> Doubles:
    """Return timesteps of the solvers: one more is spaced, and the earliest left to the end of the run."""
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].copy()
    if spacing == "leading":
        return (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1].astype(np.float64) + offset
    return np.arange(last, 0, -train / steps).round() - 1


def in_range(times: NDArray[Any], train: int, steps: int) -> None:
    """Raise InputError if a schedule leaves the timesteps of training: rounding and steps_offset can do that."""
    outside = [time for time in times if not 0 <= time <= train - 1]
    if outside or not len(times):
        what = f"timestep {outside[0]:g}" if outside else "no timestep"
        raise InputError(
            f"{steps} steps make a schedule with {what}, outside of training's 0 to {train - 1}",
            where="steps",
            hint="Give one step more or less, or change scheduler.timestep_spacing or scheduler.steps_offset.",
        )


def check_one_spread(config: SigmaOptions) -> None:
    """Raise ConfigError if more than one way to spread noise levels is asked for."""
    chosen = [name for name in SPREADS if getattr(config, name)]
    if len(chosen) > 1:
        raise refuse(config, chosen[1], f"{' and '.join(chosen)} exclude each other", "Set one of them alone.")


def check_not_spread(config: Options) -> None:
    """Raise InputError if the options spread noise levels in a way of their own, which timesteps of a call do not."""
    for name in (*SPREADS, "use_lu_lambdas", "use_flow_sigmas"):
        if getattr(config, name, False):
            raise takes_none(config, "timesteps", f" with {name}")


def interpolated(alphas: Array, times: NDArray[Any]) -> Doubles:
    """Return the noise level at timesteps between those of training."""
    table = sigma_table(alphas)
    return np.asarray(np.interp(times, np.arange(len(table)), table))


def spread(config: SigmaOptions, highest: float, lowest: float, steps: int) -> Doubles | None:
    """Return noise levels from `highest` to `lowest`, or to the config's own ends; None if none are asked for."""
    high = config.sigma_max if config.sigma_max is not None else highest
    low = config.sigma_min if config.sigma_min is not None else lowest
    ramp = np.linspace(0, 1, steps)
    if config.use_karras_sigmas:
        high_root, low_root = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        return np.asarray((high_root + ramp * (low_root - high_root)) ** KARRAS_RHO)
    if config.use_exponential_sigmas:
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if config.use_beta_sigmas:
        return low + symmetric_beta_quantile(1 - ramp, BETA_SHAPE) * (high - low)
    return None


def spread_evenly(logs: Array, steps: int) -> Doubles:
    """Return noise levels of equal steps in their logarithm ("lu")."""
    low, high = float(logs[0]), float(logs[-1])
    return np.exp(high + np.linspace(0, 1, steps) * (low - high))


def times_of(sigmas: NDArray[Any], alphas: Array) -> NDArray[Any]:
    """Return the (fractional) timesteps of noise levels, in their dtype: linear in log sigma between training's."""
    logs = np.log(sigma_table(alphas))
    log = np.log(np.maximum(sigmas, np.asarray(1e-10, sigmas.dtype)))
    # The last timestep with no more noise: where the last alpha is kept off zero, levels do not only grow.
    reached = log >= logs[:, None]
    last = len(logs) - 1 - reached[::-1].argmax(axis=0)
    low = np.where(reached.any(axis=0), last, 0).clip(max=len(logs) - 2)
    weight = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low.astype(weight.dtype) + weight * (low + 1).astype(weight.dtype))


def schedule(
    config: Any,
    alphas: Array,
    steps: int,
    *,
    given: Doubles | None = None,
    sigmas: NDArray[Any] | None = None,
    dtype: Any = np.float32,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the timesteps and noise levels of Euler's family, without the last level: float32 or float64, float64.

    `given` are timesteps of a call; `sigmas` are levels to take in place of those of the timesteps, and `dtype` is that
    in which these are interpolated.
    """
    train = config.num_train_timesteps
    own = spaced(config.timestep_spacing, train, steps, config.steps_offset) if given is None else given
    times = own.astype(dtype)
    levels = interpolated(alphas, times) if sigmas is None else sigmas
    spreads = isinstance(config, SigmaOptions)
    changed = spread(config, float(levels[0]), float(levels[-1]), steps) if spreads else None
    if changed is not None:
        return times_of(changed, alphas), changed
    in_range(times, train, steps)
    return times, levels
