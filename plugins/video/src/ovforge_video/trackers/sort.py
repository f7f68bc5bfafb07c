"""SORT: predictions of a Kalman filter are matched with boxes by their overlap.

Source: "Simple Online and Realtime Tracking" (Bewley et al. 2016).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.matching import assign, overlaps
from ovforge_video.trackers.options import SortOptions
from ovforge_video.trackers.tracks import Things, same_class

__all__ = ["Sort"]


class Sort:
    """Follows by place alone; a thing that is unseen for more than a picture is another one afterwards."""

    def __init__(self, options: SortOptions, threshold: float) -> None:
        self._options, self._threshold, self._things, self._pictures = options, threshold, Things(), 0

    def update(self, found: Boxes | None, picture: Any, seconds: float) -> Tracks:
        """Return what is in the next picture; see `ovforge.contracts.Tracker`."""
        things, options = self._things, self._options
        self._pictures += 1
        things.step()
        assert found is not None
        where = np.flatnonzero(found.scores >= self._threshold)
        sure = found.take(where)
        able = same_class(things.classes, sure.classes, options.per_class)
        pairs = assign(overlaps(things.motion.boxes(), sure.boxes), options.overlap, able)
        things.see(pairs[0], sure, pairs[1], where)
        things.add(sure.take(pairs[3]), where[pairs[3]], sure=False)
        things.keep(things.unseen <= options.keep)
        counts = (things.run >= options.hits) | (self._pictures <= options.hits)
        things.sure |= counts
        return things.shown((things.unseen == 0) & counts)
