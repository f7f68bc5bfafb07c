"""The quantile function of a symmetric beta distribution, without scipy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["symmetric_beta_quantile"]

Doubles = NDArray[np.float64]
TERMS = 60
"""Of a series in x <= 1/2: the rest is below 2**-60."""


def symmetric_beta_quantile(probability: Doubles, shape: float) -> Doubles:
    """Return x with P(X <= x) = `probability` for X ~ Beta(shape, shape), to about 1e-15, float64.

    Below the median by Newton's method on u = x**shape, in which the distribution is nearly linear; above by symmetry.
    """
    lower = np.minimum(probability, 1 - probability)
    scale = shape * math.gamma(shape) ** 2 / math.gamma(2 * shape)
    wanted = lower * scale
    root = wanted.copy()
    for _ in range(8):
        x = np.minimum(root ** (1 / shape), 0.5)
        # The derivative of u * F(x) in u is (1 - x)**(shape - 1): that of the distribution, in other variables.
        root -= (root * _series(x, shape) - wanted) * (1 - x) ** (1 - shape)
    x = np.minimum(root ** (1 / shape), 0.5)
    return np.where(probability <= 0.5, x, 1 - x)


def _series(x: Doubles, shape: float) -> Doubles:
    """Return Gauss's 2F1(shape, 1 - shape; shape + 1; x): the incomplete beta function is x**shape / shape times it."""
    total, term = np.ones_like(x), np.ones_like(x)
    for n in range(TERMS):
        term = term * x * ((shape + n) * (1 - shape + n) / ((shape + 1 + n) * (n + 1)))
        total += term
    return total
