"""The tracker itself: there is one for each stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ovforge.model import Boxes, Tracks
from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What a config may say. A misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overlap: float = Field(0.3, gt=0, le=1, description="Least overlap (IoU) between two boxes of one thing.")


class Tracker:
    """Gives a box the number of the box of the picture before that it overlaps most."""

    def __init__(self, options: Options, threshold: float) -> None:
        self.options, self.threshold = options, threshold
        self.before = np.zeros((0, 4), np.float32)
        self.ids = np.zeros(0, np.int64)
        self.last = 0

    def update(self, found: Boxes | None, picture: NDArray[np.uint8], seconds: float) -> Tracks:
        """Return what is in the next picture. `found` is never None, since the description says every_picture."""
        assert found is not None
        rows = np.flatnonzero(found.scores >= self.threshold)
        found = found.take(rows)
        shared = overlaps(found.boxes, self.before)
        ids = np.zeros(len(found), np.int64)
        while shared.size and shared.max() >= self.options.overlap:
            row, old = np.unravel_index(shared.argmax(), shared.shape)
            ids[row] = self.ids[old]
            shared[row], shared[:, old] = 0, 0
        for row in np.flatnonzero(ids == 0):
            self.last += 1
            ids[row] = self.last
        self.before, self.ids = found.boxes, ids
        return Tracks(found.boxes, found.scores, found.classes, ids, rows)


def overlaps(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the intersection over union of boxes (n, 4) with others (m, 4), as (n, m)."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)
