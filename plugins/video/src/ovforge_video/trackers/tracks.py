"""What all trackers hold of their things, beside where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.kalman import Motion

__all__ = ["Things", "same_class"]

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]


class Things:
    """Columns of facts about n things, and their motion; all are kept, added and dropped together."""

    def __init__(self) -> None:
        self.motion = Motion()
        self.ids: Numbers = np.zeros(0, np.int64)
        self.classes: Numbers = np.zeros(0, np.int64)
        self.scores = np.zeros(0)
        self.unseen: Numbers = np.zeros(0, np.int64)
        """Pictures since the last box."""
        self.hits: Numbers = np.zeros(0, np.int64)
        """Boxes so far."""
        self.run: Numbers = np.zeros(0, np.int64)
        """Boxes in a row."""
        self.sure: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether a thing counts."""
        self.boxes = np.zeros((0, 4))
        """The last box of each."""
        self.rows: Numbers = np.zeros(0, np.int64)
        """Which of this picture's boxes is the thing's, -1 for none."""
        self.last = 0

    def __len__(self) -> int:
        return len(self.ids)

    def step(self, steps: float = 1.0) -> None:
        """Go on to the next picture, `steps` thirtieths of a second later."""
        self.motion.step(self.unseen > 0, steps)
        self.unseen += 1
        self.rows[:] = -1

    def see(
        self, things: Numbers, found: Boxes, rows: Numbers, where: Numbers | None = None, doubt: Floats | None = None
    ) -> None:
        """Give things their boxes: `rows` of `found`, which are the boxes `where` of all that the tracker was given.

        `doubt` (m,) multiplies the variance of the boxes' places.
        """
        self.motion.correct(things, found.boxes[rows], doubt)
        self.boxes[things], self.scores[things] = found.boxes[rows], found.scores[rows]
        self.classes[things] = found.classes[rows]
        self.run[things] = np.where(self.unseen[things] <= 1, self.run[things] + 1, 1)
        self.hits[things] += 1
        self.unseen[things] = 0
        self.rows[things] = rows if where is None else where[rows]

    def add(self, found: Boxes, where: Numbers, *, sure: bool) -> None:
        """Append new things. Each has a number only when it counts: numbers have no gaps."""
        count = len(found)
        self.motion.add(found.boxes)
        columns: dict[str, Any] = {
            "ids": np.zeros(count, np.int64), "classes": found.classes, "scores": found.scores,
            "unseen": np.zeros(count, np.int64), "hits": np.ones(count, np.int64), "run": np.ones(count, np.int64),
            "sure": np.full(count, sure), "boxes": found.boxes, "rows": where,
        }  # fmt: skip
        for name, values in columns.items():
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, values.astype(old.dtype)]))

    def keep(self, which: NDArray[np.bool_]) -> None:
        """Drop the things that `which` (n,) does not name."""
        self.motion.keep(which)
        for name in ("ids", "classes", "scores", "unseen", "hits", "run", "sure", "boxes", "rows"):
            setattr(self, name, getattr(self, name)[which])

    def shown(self, which: NDArray[np.bool_], boxes: NDArray[np.floating] | None = None) -> Tracks:
        """Return things that are in the picture, where `boxes` (n, 4) say, by default where they were last found."""
        for n in np.flatnonzero(which & (self.ids == 0)):
            self.last += 1
            self.ids[n] = self.last
        places = self.boxes if boxes is None else boxes
        return Tracks(
            places[which].astype(np.float32), self.scores[which].astype(np.float32), self.classes[which],
            self.ids[which], self.rows[which],
        )  # fmt: skip


def same_class(things: Numbers, found: Numbers, per_class: bool) -> NDArray[np.bool_] | None:
    """Return which pairs (n, m) have one class; None if that does not matter."""
    return things[:, None] == found[None] if per_class else None
