"""OC-SORT: what was seen counts for more than what the motion foretells.

Source: "Observation-Centric SORT: Rethinking SORT for Robust Multi-Object Tracking" (Cao et al. 2023): momentum of
observations (OCM) in the cost, recovery by the last observation (OCR), and re-update along a virtual way (ORU). The
motion is the one that the trackers here share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.kalman import Motion
from ovforge_video.trackers.matching import assign, middles, overlaps
from ovforge_video.trackers.options import OcSortOptions
from ovforge_video.trackers.tracks import Things, same_class

__all__ = ["OcSort"]

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


class OcSort:
    """Matches predictions with boxes by overlap and direction, then last boxes with the boxes that are left."""

    def __init__(self, options: OcSortOptions, threshold: float) -> None:
        self._options, self._threshold = options, threshold
        self._things, self._pictures = Things(), 0
        self._past: Floats = np.zeros((0, options.span, 2))
        """Middles of each thing's last boxes, the oldest first."""
        self._mean: Floats = np.zeros((0, 8))
        self._spread: Floats = np.zeros((0, 8, 8))
        """The motion of each thing when it was seen last."""

    def update(self, found: Boxes | None, picture: Any, seconds: float) -> Tracks:
        """Return what is in the next picture; see `ovforge.contracts.Tracker`."""
        things, options = self._things, self._options
        self._pictures += 1
        things.step()
        assert found is not None
        where = np.flatnonzero(found.scores >= self._threshold)
        sure = found.take(where)
        shared = overlaps(things.motion.boxes(), sure.boxes)
        likeness = shared + options.momentum * self._agreement(sure)
        able = same_class(things.classes, sure.classes, options.per_class)
        fits = (shared >= options.overlap) if able is None else (shared >= options.overlap) & able
        ours, theirs, left, free = assign(np.where(fits, likeness, -9.0), -5.0)
        self._see(ours, sure, theirs, where)
        last = overlaps(things.boxes[left], sure.boxes[free])
        able = same_class(things.classes[left], sure.classes[free], options.per_class)
        ours, theirs, _, new = assign(last, options.overlap, able)
        self._see(left[ours], sure, free[theirs], where)
        self._add(sure.take(free[new]), where[free[new]])
        self._keep(things.unseen <= options.keep)
        counts = (things.run >= options.hits) | (self._pictures <= options.hits)
        things.sure |= counts
        return things.shown((things.unseen == 0) & counts)

    def _agreement(self, found: Boxes) -> Floats:
        """Return how well boxes (m) lie in the direction that things (n) moved in, times their scores: -1/2..1/2."""
        theirs = middles(found.boxes)
        now = middles(self._things.boxes)
        moved = now - self._past[:, 0]
        ahead = theirs[None] - self._past[:, :1]
        length = np.linalg.norm(moved, axis=1)[:, None] * np.linalg.norm(ahead, axis=2)
        cosine = np.divide((ahead * moved[:, None]).sum(2), length, out=np.zeros_like(length), where=length > 0)
        angle = np.where(length > 0, np.arccos(np.clip(cosine, -1, 1)), np.pi / 2)
        agreement: Floats = (0.5 - angle / np.pi) * found.scores[None].astype(np.float64)
        return agreement

    def _see(self, of: Numbers, found: Boxes, rows: Numbers, where: Numbers) -> None:
        things = self._things
        for thing, row in zip(of.tolist(), rows.tolist(), strict=True):
            if (steps := int(things.unseen[thing])) > 1:
                self._update_again(thing, found.boxes[row], steps)
        things.see(of, found, rows, where)
        self._mean[of], self._spread[of] = things.motion.mean[of], things.motion.spread[of]
        self._past[of] = np.concatenate([self._past[of, 1:], middles(found.boxes[rows])[:, None]], 1)

    def _update_again(self, thing: int, box: NDArray[np.float32], steps: int) -> None:
        """Lead a thing that was unseen from its last box to this one by an even way, up to the step before it."""
        motion, again = self._things.motion, Motion()
        again.mean, again.spread = self._mean[[thing]], self._spread[[thing]]
        last = self._things.boxes[thing]
        for step in range(1, steps):
            again.step()
            again.correct(np.zeros(1, np.int64), (last + (box - last) * step / steps)[None])
        again.step()
        motion.mean[thing], motion.spread[thing] = again.mean[0], again.spread[0]

    def _add(self, found: Boxes, where: Numbers) -> None:
        things, count = self._things, len(found)
        things.add(found, where, sure=False)
        self._past = np.concatenate([self._past, np.tile(middles(found.boxes)[:, None], (1, self._options.span, 1))])
        self._mean = np.concatenate([self._mean, things.motion.mean[len(things) - count :]])
        self._spread = np.concatenate([self._spread, things.motion.spread[len(things) - count :]])

    def _keep(self, which: NDArray[np.bool_]) -> None:
        self._things.keep(which)
        self._past, self._mean, self._spread = self._past[which], self._mean[which], self._spread[which]
