"""What things look like, by their colours: quick, and enough to tell people in different clothes apart.

Source: "Color Indexing" (Swain and Ballard 1991), in opponent colours; compared by the Bhattacharyya coefficient as in
"Kernel-Based Object Tracking" (Comaniciu et al. 2003).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BANDS", "BINS", "likenesses", "looks"]

BANDS, BINS = 3, 8
"""Parts of a thing from top to bottom, and parts of a colour's range."""
SAMPLES = 24
"""Pixels of a side that are looked at."""
EDGE = 0.15
"""Share of a box on each side that rather shows what is beside the thing."""


def looks(picture: NDArray[np.uint8], boxes: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the looks (n, BANDS x 3 x BINS) of boxes (n, 4) in a picture, RGB (height, width, 3).

    They are square roots of shares, so that each row has the length 1.
    """
    height, width = picture.shape[:2]
    boxes = np.asarray(boxes, np.float64)
    steps = EDGE + (1 - 2 * EDGE) * (np.arange(SAMPLES) + 0.5) / SAMPLES
    x = boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) * steps
    y = boxes[:, 1:2] + (boxes[:, 3:] - boxes[:, 1:2]) * steps
    columns = np.clip(x, 0, width - 1).astype(np.intp)
    rows = np.clip(y, 0, height - 1).astype(np.intp)
    pixels = picture[rows[:, :, None], columns[:, None, :]].astype(np.int16)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    light = (red + green + blue) // 3 * BINS // 256
    # Clothes differ little in colour: the middle of the range is drawn out.
    warm = np.clip((red - green) // 8 + BINS // 2, 0, BINS - 1)
    cold = np.clip((2 * blue - red - green) // 16 + BINS // 2, 0, BINS - 1)
    count = len(boxes)
    band = (np.arange(SAMPLES) * BANDS // SAMPLES)[None, :, None]
    whose = np.arange(count)[:, None, None]
    counts = np.zeros((count, BANDS, 3, BINS), np.float32)
    for channel, values in enumerate((light, warm, cold)):
        place = ((whose * BANDS + band) * 3 + channel) * BINS + values
        counts += np.bincount(place.ravel(), minlength=counts.size).reshape(counts.shape)
    shares = counts.reshape(count, BANDS * 3 * BINS) / (SAMPLES * SAMPLES * 3)
    return np.sqrt(shares, dtype=np.float32)


def likenesses(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how much looks (n, k) are like others (m, k), as (n, m), 0..1."""
    return np.clip(ours.astype(np.float64) @ theirs.astype(np.float64).T, 0, 1)
