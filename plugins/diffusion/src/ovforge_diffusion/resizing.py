"""Pictures and masks at the size that a model takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.model import open_picture

__all__ = ["enlarged", "filling", "resized", "resized_mask", "scaled"]

Array = NDArray[np.float32]


def resized(image: Any, where: str, width: int, height: int) -> Image.Image:
    """Return an RGB picture at a size, by Lanczos if it has another, as diffusers' image processor does."""
    return scaled(open_picture(image, where), width, height)


def resized_mask(image: Any, where: str, width: int, height: int) -> Image.Image:
    """Return a mask at a size, mode L: its brightness times its opacity, so that what is transparent is black."""
    return scaled(open_picture(image, where, "L", background="black"), width, height)


def scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture at a size, by Lanczos if it has another."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def filling(sample: Array, width: int, height: int) -> Array:
    """Return a sample (channels, height, width) scaled until it fills a size, and cut in the middle, as diffusers does.

    Between pixels it is bilinear, and does not average: resize_and_crop_tensor of diffusers' PixArtImageProcessor.
    """
    _, own_height, own_width = sample.shape
    rows, columns, top, left = enlarged(own_width, own_height, width, height)
    scaled_rows = _between(sample, rows, axis=1)[:, top : top + height]
    return _between(scaled_rows, columns, axis=2)[:, :, left : left + width]


def enlarged(own_width: int, own_height: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Return to how many rows and columns a sample is scaled to fill a size, and the first row and column kept."""
    ratio = max(height / own_height, width / own_width)
    rows, columns = int(own_height * ratio), int(own_width * ratio)
    return rows, columns, (rows - height) // 2, (columns - width) // 2


def _between(sample: Array, length: int, axis: int) -> Array:
    """Return a sample scaled along an axis; places are those of the middles of pixels."""
    own = sample.shape[axis]
    if own == length:
        return sample
    places = np.maximum((np.arange(length) + 0.5) * (own / length) - 0.5, 0)
    first = np.minimum(places.astype(np.int64), own - 1)
    shape = [1] * sample.ndim
    shape[axis] = length
    share = (places - first).astype(np.float32).reshape(shape)
    below, above = (sample.take(np.minimum(first + step, own - 1), axis=axis) for step in (0, 1))
    made: Array = below * (np.float32(1) - share) + above * share
    return made
