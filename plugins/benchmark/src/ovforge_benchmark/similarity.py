"""How alike two pictures are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["psnr", "ssim"]

Array = NDArray[np.float64]


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Return the peak signal-to-noise ratio in decibels over RGB; infinite for equal pictures."""
    error = float(np.mean((_rgb(a) - _rgb(b)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Return the mean structural similarity of two pictures of one size, 1 for equal ones.

    Of the luma, with the Gaussian window (11, sigma 1.5) and constants of Wang et al. 2004.
    """
    x, y = (_rgb(image) @ np.array([0.299, 0.587, 0.114]) for image in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(index.mean())


def _rgb(image: Image.Image) -> Array:
    return np.asarray(image.convert("RGB"), np.float64)


def _blur(values: Array) -> Array:
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (0, 1):
        values = np.apply_along_axis(np.convolve, axis, values, window, "valid")
    return values
