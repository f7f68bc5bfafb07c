"""How alike two pictures are, in numpy: no learned weights, the same number everywhere.

Pictures are uint8 arrays of one shape, (height, width, channels). Every metric is symmetric, and higher is closer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS", "Metric", "gmsd", "psnr", "ssim"]

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

MAX_PSNR = 100.0
"""What `psnr` says of equal pictures, in dB; their ratio is infinite."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of two pictures, and what it says of equal ones and of ones that have nothing in common."""

    measure: Callable[[Pixels, Pixels], float]
    perfect: float
    worst: float
    unit: str = ""


def psnr(first: Pixels, second: Pixels) -> float:
    """Return the peak signal-to-noise ratio over all channels, in dB, at most MAX_PSNR."""
    _same_shape(first, second)
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(10 * np.log10(255.0**2 / error)))


def ssim(first: Pixels, second: Pixels) -> float:
    """Return the mean structural similarity, at most 1, over places and channels.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity": a Gaussian window of
    11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, at the places where the window lies inside the picture. In smaller
    pictures the window is smaller. Channels count alike, so that a shift of colour is seen.
    """
    _same_shape(first, second)
    window = _gaussian(min(5, (min(first.shape[:2]) - 1) // 2))
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = _filtered(x, window), _filtered(y, window)
    var_x = _filtered(x * x, window) - mean_x**2
    var_y = _filtered(y * y, window) - mean_y**2
    covariance = _filtered(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def gmsd(first: Pixels, second: Pixels) -> float:
    """Return 1 less the gradient magnitude similarity deviation: at most 1, and lower where edges are lost in places.

    Xue et al. 2014, "Gradient Magnitude Similarity Deviation: A Highly Efficient Perceptual Image Quality Index":
    luminance, halved by averages of 2x2, Prewitt gradients, c = 170; the deviation over places, which tells damage that
    is only somewhere from noise that is everywhere.
    """
    _same_shape(first, second)
    gradients = [_gradient(_halved(_luminance(picture))) for picture in (first, second)]
    similarity = (2 * gradients[0] * gradients[1] + 170) / (gradients[0] ** 2 + gradients[1] ** 2 + 170)
    return 1 - float(similarity.std())


METRICS: Mapping[str, Metric] = {
    "ssim": Metric(ssim, 1.0, 0.0),
    "psnr": Metric(psnr, MAX_PSNR, 0.0, "dB"),
    "gmsd": Metric(gmsd, 1.0, 0.0),
}


def _same_shape(first: Pixels, second: Pixels) -> None:
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"pictures of {first.shape} and {second.shape} are not comparable")


def _gaussian(radius: int) -> Floats:
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    return np.asarray(window / window.sum(), np.float64)


def _filtered(values: Floats, window: Floats) -> Floats:
    """Filter (height, width, channels) along both sides, where the window lies inside."""
    for axis in (0, 1):
        size = values.shape[axis] - len(window) + 1
        parts = (weight * np.take(values, range(n, n + size), axis) for n, weight in enumerate(window))
        values = sum(parts, start=np.zeros(()))
    return values


def _luminance(picture: Pixels) -> Floats:
    """Return float64 (height, width), by ITU-R BT.601 if there are three channels."""
    values = picture.astype(np.float64)
    return values[..., :3] @ np.array([0.299, 0.587, 0.114]) if picture.shape[2] >= 3 else values[..., 0]


def _halved(values: Floats) -> Floats:
    height, width = (max(side // 2, 1) for side in values.shape)
    even = values[: height * 2, : width * 2]
    blocks = even.reshape(height, even.shape[0] // height, width, even.shape[1] // width)
    return np.asarray(blocks.mean(axis=(1, 3)), np.float64)


def _gradient(values: Floats) -> Floats:
    """Return the magnitude of Prewitt's gradients, edges continued."""
    padded = np.pad(values, 1, mode="edge")
    height, width = values.shape
    columns = sum((padded[n : n + height] for n in range(3)), start=np.zeros(()))
    rows = sum((padded[:, n : n + width] for n in range(3)), start=np.zeros(()))
    across, down = (columns[:, 2:] - columns[:, :-2]) / 3, (rows[2:] - rows[:-2]) / 3
    return np.hypot(across, down)
