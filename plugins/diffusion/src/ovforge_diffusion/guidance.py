"""Guidance: which halves of a prediction a step computes, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Guidance", "SkipLayers", "never_acts"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class SkipLayers:
    """Guidance away from a prediction without some layers, which is the last half, in a part of the steps.

    Source: diffusers' StableDiffusion3Pipeline, after Stability AI's own code for Stable Diffusion 3.5 medium.
    """

    scale: float
    start: float
    stop: float
    steps: int
    """Steps of the whole run, of which `start` and `stop` are parts."""

    def acts(self, number: int, steps: int) -> bool:
        """Say whether it counts at call `number` of `steps`; methods of two calls a step count calls."""
        whole = min(self.steps, steps)
        return whole * self.start < number < whole * self.stop


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2021) over halves; the first is the unconditional one.

    With `skip`, the last half is that of the prompt once more, with layers left out.

    `weights`, float32 (halves - 1, pictures), says how strongly each of the others counts (composable diffusion, Liu et
    al. 2022). `rescale` is how far the result keeps the deviation of an unguided prediction (Lin et al. 2024).
    """

    halves: int
    scale: float
    weights: Array
    rescale: float = 0.0
    skip: SkipLayers | None = None
    start: float = 0.0
    """The part of the steps after which it begins (Kynkaanniemi et al. 2024), as diffusers' guiders have it."""

    until: int | None = None
    """The step at which it ends; None if it acts to the last."""

    keeps_norm: bool = False
    """Whether the result has the norm, along the last axis, of a prediction that is not guided."""

    largest_norm: float = 0.0
    """How many times the norm of such a prediction, over a whole picture, the result may have; 0: any."""

    @property
    def varies(self) -> bool:
        """Whether steps differ in the halves that they need: each half is then a call of its own."""
        return self.skip is not None or self.is_partial

    @property
    def is_partial(self) -> bool:
        """Whether guidance acts in a part of the steps only."""
        return self.halves > 1 and (self.start > 0 or self.until is not None)

    def active(self, number: int, steps: int) -> tuple[int, ...]:
        """Return the halves that step `number` of `steps` needs: outside the interval, not the unconditional one."""
        last = self.halves - 1 if self.skip and not self.skip.acts(number, steps) else self.halves
        end = steps if self.until is None else self.until
        inside = not self.is_partial or int(self.start * steps) <= number < end
        return tuple(range(0 if inside else 1, last))

    def combine(self, halves: Mapping[int, Array]) -> Array:
        """Return the prediction of active halves; a new array if there is more than one."""
        if len(halves) == 1:
            return next(iter(halves.values()))
        without = halves[0]
        output = np.zeros_like(without)
        for number, weight in enumerate(self.weights, 1):
            output += (halves[number] - without) * weight.reshape(-1, *[1] * (without.ndim - 1))
        rescale = np.float32(self.rescale)
        deviation = _deviation(output + without) if rescale else None
        norm = _norm(output + without) if self.keeps_norm else None
        most = _norm(output + without, whole=True) * np.float32(self.largest_norm) if self.largest_norm else None
        output *= np.float32(self.scale)
        output += without
        if deviation is not None:  # section 3.4
            ratio = deviation / _deviation(output)
            output *= rescale * ratio + (np.float32(1) - rescale)
        if norm is not None:
            output *= norm / _norm(output)
        if most is not None:
            output *= np.minimum(most / _norm(output, whole=True), np.float32(1))
        if self.skip is not None and self.halves - 1 in halves:
            output += (halves[1] - halves[self.halves - 1]) * np.float32(self.skip.scale)
        return output


def never_acts(start: float, stop: float, end: int, calls: int) -> list[str]:
    """Return a warning if no call lies in an interval of guidance, which ends before call `end`."""
    if int(start * calls) < end:
        return []
    return [
        f"nothing is guided: of {calls} calls of the network, none lies between guidance_start = {start:g} and "
        f"guidance_stop = {stop:g}"
    ]


def _norm(values: Array, *, whole: bool = False) -> Array:
    """Return the norm along the last axis, or of each picture, (pictures, 1, ...)."""
    axes = tuple(range(1, values.ndim)) if whole else -1
    norm: Array = np.sqrt(np.square(values).sum(axis=axes, keepdims=True, dtype=np.float32))
    return np.maximum(norm, np.finfo(np.float32).tiny)


def _deviation(values: Array) -> Array:
    """Return torch's standard deviation of each picture, (pictures, 1, ...): by count - 1."""
    axes = tuple(range(1, values.ndim))
    deviation: Array = values.std(axis=axes, keepdims=True, ddof=1, dtype=np.float32)
    return deviation
