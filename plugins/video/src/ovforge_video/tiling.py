"""A detector that looks at parts of a frame, too: small things are larger there.

Source: "Slicing Aided Hyper Inference" (Akyon et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import FrameDetector
from ovforge.model import Boxes
from ovforge_video.trackers.matching import inside

__all__ = ["Tiled"]

SHARED = 0.2
"""Part of a tile's side that it shares with the next."""
SAME = 0.5
"""Overlap, as a share of the smaller box, above which two boxes of a class are one thing."""


class Tiled:
    """Looks at `count` x `count` overlapping parts of each frame, and at the whole."""

    def __init__(self, detector: FrameDetector, count: int) -> None:
        self._detector, self._count = detector, count
        self.names, self.threshold = detector.names, detector.threshold
        self.notes, self.parallel, self.batch = detector.notes, detector.parallel, 1

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Boxes]:
        """Return what is in each frame, from the highest score to the lowest."""
        return [self._look(picture) for picture in pictures]

    def _look(self, picture: NDArray[np.uint8]) -> Boxes:
        rows, columns = (self._spans(side) for side in picture.shape[:2])
        places = [(0, 0), *((left, top) for top, _ in rows for left, _ in columns)]
        parts = [
            picture,
            *(np.ascontiguousarray(picture[slice(*row), slice(*column)]) for row in rows for column in columns),
        ]
        step = max(1, self._detector.batch)
        found = [boxes for first in range(0, len(parts), step) for boxes in self._detector(parts[first : first + step])]
        boxes = np.concatenate(
            [each.boxes + np.array([x, y, x, y], np.float32) for each, (x, y) in zip(found, places, strict=True)]
        )
        scores = np.concatenate([each.scores for each in found])
        classes = np.concatenate([each.classes for each in found])
        return _merged(Boxes(boxes.astype(np.float32), scores, classes))

    def _spans(self, side: int) -> list[tuple[int, int]]:
        length = min(side, max(1, round(side / (self._count - (self._count - 1) * SHARED))))
        starts = [round(n * (side - length) / max(1, self._count - 1)) for n in range(self._count)]
        return [(start, start + length) for start in starts]


def _merged(found: Boxes) -> Boxes:
    """Return what is left if, of two boxes of a class that lie in each other, the lower score goes."""
    found = found.take(np.argsort(-found.scores, kind="stable"))
    kept: list[int] = []
    for n in range(len(found)):
        box, others = found.boxes[n : n + 1], found.boxes[kept]
        share = np.maximum(inside(box, others)[0], inside(others, box)[:, 0])
        if not ((share > SAME) & (found.classes[kept] == found.classes[n])).any():
            kept.append(n)
    return found.take(np.array(kept, np.int64))
