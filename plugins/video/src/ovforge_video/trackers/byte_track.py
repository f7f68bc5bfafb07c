"""ByteTrack: weak boxes, such as those of things that are half hidden, prolong the tracks that sure ones begin.

Source: "ByteTrack: Multi-Object Tracking by Associating Every Detection Box" (Zhang et al. 2022).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.matching import assign, overlaps
from ovforge_video.trackers.options import ByteTrackOptions
from ovforge_video.trackers.tracks import Things, same_class

__all__ = ["ByteTrack"]


class ByteTrack:
    """Matches sure boxes with all tracks, then weak ones with those that were seen in the picture before."""

    def __init__(self, options: ByteTrackOptions, threshold: float) -> None:
        self._options, self._high = options, threshold if options.high is None else options.high
        self._things, self._first = Things(), True

    def update(self, found: Boxes | None, picture: Any, seconds: float) -> Tracks:
        """Return what is in the next picture; see `ovforge.contracts.Tracker`."""
        things, options = self._things, self._options
        things.step()
        if found is None:
            return things.shown(things.sure & (things.unseen <= 1), things.motion.boxes())
        places = things.motion.boxes()
        high = np.flatnonzero(found.scores >= self._high)
        weak = np.flatnonzero((found.scores >= options.low) & (found.scores < self._high))
        sure, counted = found.take(high), np.flatnonzero(things.sure)

        def matched(which: Any, boxes: Boxes, where: Any, least: float, scored: bool) -> tuple[Any, Any]:
            shared = overlaps(places[which], boxes.boxes)
            if scored:
                shared = shared * boxes.scores[None]
            able = same_class(things.classes[which], boxes.classes, options.per_class)
            pairs = assign(shared, least, able)
            things.see(which[pairs[0]], boxes, pairs[1], where)
            return which[pairs[2]], pairs[3]

        before = things.unseen.copy()
        left, free = matched(counted, sure, high, options.overlap, True)
        recent = left[before[left] <= 1]
        matched(recent, found.take(weak), weak, options.weak_overlap, False)
        sure, high = sure.take(free), high[free]
        left, free = matched(np.flatnonzero(~things.sure), sure, high, options.first_overlap, True)
        things.sure |= things.hits > 1
        stays = things.unseen <= options.keep
        stays[left] = False
        new = free[sure.scores[free] >= min(self._high + options.rise, 1)]
        count = len(things)
        things.add(sure.take(new), high[new], sure=self._first)
        things.keep(np.concatenate([stays, np.ones(len(things) - count, np.bool_)]))
        self._first = False
        return things.shown(things.sure & (things.unseen == 0))
