"""DL Streamer's `zero-term` and `zero-term-imageless`: a thing is where it was, and, with pixels, looks as it looked.

Both need what is found in each picture. Source: DL Streamer's documentation of gvatrack.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.colours import BANDS, BINS, likenesses, looks
from ovforge_video.trackers.matching import assign, overlaps
from ovforge_video.trackers.options import ZeroTermColourOptions, ZeroTermOptions
from ovforge_video.trackers.tracks import Things, same_class

__all__ = ["ZeroTerm", "ZeroTermImageless"]


class ZeroTermImageless:
    """Gives a box the number of the thing that it overlaps; every box above the threshold is one."""

    _likeness = 0.0

    def __init__(self, options: ZeroTermOptions, threshold: float) -> None:
        self._options, self._threshold, self._things = options, threshold, Things()
        self._looks = np.zeros((0, BANDS * 3 * BINS), np.float32)

    def update(self, found: Boxes | None, picture: NDArray[np.uint8], seconds: float) -> Tracks:
        """Return what is in the next picture; see `ovforge.contracts.Tracker`."""
        assert found is not None
        things = self._things
        things.step()
        where = np.flatnonzero(found.scores >= self._threshold)
        sure = found.take(where)
        shared = overlaps(things.boxes, sure.boxes)
        seen = self._seen(picture, sure)
        alike = likenesses(self._looks, seen)
        fits = (shared >= self._options.overlap) & (alike >= self._likeness)
        able = same_class(things.classes, sure.classes, self._options.per_class)
        ours, theirs, _, new = assign(np.where(fits, shared + alike, -1.0), 0.0, able)
        things.see(ours, sure, theirs, where)
        self._looks[ours] = seen[theirs]
        things.add(sure.take(new), where[new], sure=True)
        self._looks = np.concatenate([self._looks, seen[new]])
        kept = things.unseen <= self._options.keep
        things.keep(kept)
        self._looks = self._looks[kept]
        return things.shown(things.unseen == 0)

    def _seen(self, picture: NDArray[np.uint8], found: Boxes) -> NDArray[np.float32]:
        return np.zeros((len(found), self._looks.shape[1]), np.float32)


class ZeroTerm(ZeroTermImageless):
    """The same, and a thing's boxes have its colours."""

    def __init__(self, options: ZeroTermColourOptions, threshold: float) -> None:
        super().__init__(options, threshold)
        self._likeness = options.likeness

    def _seen(self, picture: NDArray[np.uint8], found: Boxes) -> NDArray[np.float32]:
        return looks(picture, found.boxes)
