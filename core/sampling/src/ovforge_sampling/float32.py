"""torch's float32 arithmetic in numpy, as near as it goes: the last bits of a schedule decide its last digits.

Where alpha is small a run multiplies the schedule's error by 1 / sqrt(alpha), and the coefficients of third-order
solvers are differences of nearly equal numbers: what is computed here is rounded where torch rounds.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Value", "exp", "expm1", "linspace", "log", "running_product"]

Array = NDArray[np.float32]
Value = TypeVar("Value", np.float32, Array)


def linspace(start: float, end: float, count: int) -> Array:
    """Return `torch.linspace`, to the bit: a float32 step, from both ends to the middle, each sum rounded once.

    Source: PyTorch, aten/src/ATen/native/cpu/RangeFactoriesKernel.cpp (`linspace_kernel`).
    """
    low, high = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([low])
    step = np.float64((high - low) / np.float32(count - 1))
    index = np.arange(count)
    from_low, from_high = low + step * index, high - step * (count - 1 - index)
    return np.where(index < count // 2, from_low, from_high).astype(np.float32)


def running_product(alphas: Array) -> Array:
    """Return `torch.cumprod`, to the bit: it multiplies in float64 and rounds what it stores."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def log(value: Value) -> Value:
    """Return the natural logarithm, rounded once; -inf at 0. torch's is a bit off at most, numpy's float32 one more."""
    with np.errstate(divide="ignore"):
        result: Value = _rounded(np.log(np.asarray(value, np.float64)))
    return result


def exp(value: Value) -> Value:
    """Return e to the power of `value`, rounded once."""
    result: Value = _rounded(np.exp(np.asarray(value, np.float64)))
    return result


def expm1(value: Value) -> Value:
    """Return exp(value) - 1, rounded once."""
    result: Value = _rounded(np.expm1(np.asarray(value, np.float64)))
    return result


def _rounded(value: Any) -> Any:
    return np.asarray(value).astype(np.float32)[()]
