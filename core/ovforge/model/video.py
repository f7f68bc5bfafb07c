"""What detectors and trackers say of one picture of a stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Boxes", "Tracks"]

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Boxes:
    """What was found in one picture.

    `boxes` are float32 (n, 4): left, top, right, bottom in pixels; `scores` float32 (n,), 0..1; `classes` int64 (n,).
    """

    boxes: Floats
    scores: Floats
    classes: Numbers

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def none(cls) -> Boxes:
        """Return no box."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def take(self, which: NDArray[np.generic]) -> Boxes:
        """Return these of them: positions or a mask, (n,)."""
        return Boxes(self.boxes[which], self.scores[which], self.classes[which])


@dataclass(frozen=True, slots=True)
class Tracks:
    """The things that a tracker sees in one picture: as Boxes, each with a number of its own.

    `ids` are int64 (n,), from 1 on, and never given to another thing of the stream. `rows` are int64 (n,): which of the
    boxes that the tracker was given is the thing's, -1 for a place that the tracker worked out itself.
    """

    boxes: Floats
    scores: Floats
    classes: Numbers
    ids: Numbers
    rows: Numbers

    def __len__(self) -> int:
        return len(self.ids)
