"""Kalman filters of many boxes at once, which move at a constant speed.

Source: R. E. Kalman (1960); the deviations in proportion to a box's sides are those of BoT-SORT (Aharon et al. 2022),
which takes over those of DeepSORT (Wojke et al. 2017) for centre, width and height.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Motion"]

Floats = NDArray[np.float64]

PLACE, SPEED = 1 / 20, 1 / 160
"""Deviations of a place, and of a speed in a step, as shares of a box's sides."""


class Motion:
    """The states of n boxes: `mean` (n, 8) of centre, width, height and their speeds; `spread` (n, 8, 8)."""

    def __init__(self) -> None:
        self.mean: Floats = np.zeros((0, 8))
        self.spread: Floats = np.zeros((0, 8, 8))

    def __len__(self) -> int:
        return len(self.mean)

    def boxes(self) -> Floats:
        """Return corners (n, 4)."""
        return _corners(self.mean[:, :4])

    def add(self, boxes: NDArray[np.floating]) -> None:
        """Append boxes (m, 4), corners, at rest."""
        seen = _centred(boxes)
        mean = np.concatenate([seen, np.zeros_like(seen)], 1)
        sides = np.tile(seen[:, 2:], (1, 2))
        deviations = np.concatenate([2 * PLACE * sides, 10 * SPEED * sides], 1)
        self.mean = np.concatenate([self.mean, mean])
        self.spread = np.concatenate([self.spread, _diagonal(deviations**2)])

    def keep(self, which: NDArray[np.bool_]) -> None:
        """Drop the boxes that `which` (n,) does not name."""
        self.mean, self.spread = self.mean[which], self.spread[which]

    def step(self, still: NDArray[np.bool_] | None = None, steps: float = 1.0) -> None:
        """Move all boxes by `steps` of a thirtieth of a second; sides of those that are `still` unseen do not change.

        The deviations were found for videos of about 30 pictures a second: noise grows with the time that passes.
        """
        if not len(self):
            return
        if still is not None:
            self.mean[still, 6:] = 0
        sides = np.tile(np.maximum(self.mean[:, 2:4], 1e-3), (1, 2))
        noise = np.concatenate([PLACE * sides, SPEED * sides], 1) ** 2
        move = np.eye(8) + steps * np.eye(8, k=4)
        self.mean = self.mean @ move.T
        self.mean[:, 2:4] = np.maximum(self.mean[:, 2:4], 1e-3)
        self.spread = move @ self.spread @ move.T + _diagonal(noise * steps)

    def correct(self, rows: NDArray[np.int64], boxes: NDArray[np.floating], doubt: Floats | None = None) -> None:
        """Bring what was seen in: boxes (m, 4), corners, of these rows. `doubt` (m,) multiplies their variance."""
        if not len(rows):
            return
        mean, spread = self.mean[rows], self.spread[rows]
        variance = (PLACE * np.tile(np.maximum(mean[:, 2:4], 1e-3), (1, 2))) ** 2
        noise = _diagonal(variance if doubt is None else variance * doubt[:, None])
        gain = spread[:, :, :4] @ np.linalg.inv(spread[:, :4, :4] + noise)
        apart = _centred(boxes) - mean[:, :4]
        self.mean[rows] = mean + (gain @ apart[:, :, None])[:, :, 0]
        self.spread[rows] = spread - gain @ spread[:, :4, :]


def _diagonal(values: Floats) -> Floats:
    return values[:, :, None] * np.eye(values.shape[1])


def _centred(boxes: NDArray[np.floating]) -> Floats:
    boxes = np.asarray(boxes, np.float64)
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def _corners(boxes: Floats) -> Floats:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
