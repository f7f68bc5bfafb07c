"""The default: place, motion and colours, and how sure the detector is of a thing in the long run.

Sure boxes are matched first, then weak ones (ByteTrack, Zhang et al. 2022); then boxes that are made larger about their
middles, so that small and quick things find each other ("Hard to Track Objects with Irregular Motions and Similar
Appearances? Make It Easier by Buffering the Matching Space", Yang et al. 2023). Two boxes of one thing look alike. A
thing counts only while its running mean of scores is that of a find: what the detector mostly doubts is none. The
motion believes a box the more the higher its score is ("GIAOTracker", Du et al. 2021).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.colours import BANDS, BINS, likenesses, looks
from ovforge_video.trackers.matching import assign, inside, overlaps
from ovforge_video.trackers.options import ShortTermOptions, SteadyOptions
from ovforge_video.trackers.tracks import Things, same_class

__all__ = ["ShortTerm", "Steady"]

RATE = 30.0
"""Pictures a second that the deviations of the motion were found for."""
NEAR = 0.3
"""How much of its sides a box grows on each side, as in the paper."""
MEMORY = 0.9
"""What is kept, at each box, of a thing's mean score and of its looks."""
CROWD = 0.3
"""Overlap with another box above which a box shows two things: looks are not learned there."""

Numbers = NDArray[np.int64]


class Steady:
    """Follows things of one stream; bridges pictures that the detector did not look at."""

    def __init__(self, options: SteadyOptions, threshold: float) -> None:
        self._options, self._threshold = options, threshold
        self._things, self._seconds = Things(), 0.0
        self._means = np.zeros(0)
        self._seen = np.zeros(0)
        """Second at which each thing was seen last."""
        self._looks = np.zeros((0, BANDS * 3 * BINS), np.float32)
        self._bridge = 1.0 / RATE
        """Seconds from one look of the detector to the next."""
        self._looked: float | None = None

    def update(self, found: Boxes | None, picture: NDArray[np.uint8], seconds: float) -> Tracks:
        """Return what is in the next picture; see `ovforge.contracts.Tracker`."""
        things = self._things
        things.step(max(0.0, seconds - self._seconds) * RATE if self._looked is not None else 1.0)
        self._seconds = seconds
        if found is None:
            bridged = seconds - self._seen <= self._bridge * 1.5
            return things.shown(self._counts() & bridged, things.motion.boxes())
        self._bridge = seconds - self._looked if self._looked is not None else self._bridge
        self._looked = seconds
        self._match(found.take(np.arange(len(found))), picture, seconds)
        return things.shown(self._counts() & (things.unseen == 0))

    def _counts(self) -> NDArray[np.bool_]:
        """Say which things count."""
        return self._things.sure & (self._means >= self._threshold)

    def _match(self, found: Boxes, picture: NDArray[np.uint8], seconds: float) -> None:
        things, options = self._things, self._options
        high = np.flatnonzero(found.scores >= self._threshold)
        weak = np.flatnonzero((found.scores >= options.low) & (found.scores < self._threshold))
        seen = (
            looks(picture, found.boxes)
            if options.likeness
            else np.zeros((len(found), self._looks.shape[1]), np.float32)
        )
        clear = _alone(found, high)
        places = things.motion.boxes()
        recent = seconds - self._seen <= self._bridge * 1.5

        def matched(which: Numbers, rows: Numbers, grow: float, least: float) -> tuple[Numbers, Numbers]:
            """Give things their boxes, and return the things and the rows that are left."""
            shared = overlaps(_enlarged(places[which], grow), _enlarged(found.boxes[rows], grow))
            alike = likenesses(self._looks[which], seen[rows])
            able = same_class(things.classes[which], found.classes[rows], options.per_class)
            fits = (shared >= least) & (alike >= options.likeness)  # without colours all look alike: 0
            ours, theirs, left, free = assign(np.where(fits, shared + alike, -1.0), 0.0, able)
            self._learn(which[ours], found, rows[theirs], seen, clear, seconds)
            return which[left], rows[free]

        counted, new = np.flatnonzero(things.sure), np.flatnonzero(~things.sure)
        fresh, lost = counted[recent[counted]], counted[~recent[counted]]
        fresh, high = matched(fresh, high, 0.0, options.overlap)
        fresh, _ = matched(fresh, weak, 0.0, options.weak_overlap)
        lost, high = matched(np.concatenate([lost, fresh]), high, NEAR, options.overlap)
        new, high = matched(new, high, 0.0, options.overlap)
        things.sure |= things.hits >= options.hits
        stays = np.where(things.sure, (seconds - self._seen <= options.keep) & (self._means >= self._threshold), True)
        stays[new] = False
        begins = high[found.scores[high] >= min(self._threshold + options.rise, 1.0)]
        there = things.boxes[things.sure & (things.unseen == 0)]
        begins = begins[inside(found.boxes[begins], there).max(1, initial=0) < options.part]
        count = len(things)
        things.add(found.take(begins), begins, sure=options.hits == 1)
        self._means = np.concatenate([self._means, found.scores[begins]])
        self._seen = np.concatenate([self._seen, np.full(len(begins), seconds)])
        self._looks = np.concatenate([self._looks, seen[begins]])
        kept = np.concatenate([stays, np.ones(len(things) - count, np.bool_)])
        things.keep(kept)
        self._means, self._seen, self._looks = self._means[kept], self._seen[kept], self._looks[kept]

    def _learn(
        self,
        of: Numbers,
        found: Boxes,
        rows: Numbers,
        seen: NDArray[np.float32],
        clear: NDArray[np.bool_],
        seconds: float,
    ) -> None:
        self._means[of] = MEMORY * self._means[of] + (1 - MEMORY) * found.scores[rows]
        self._seen[of] = seconds
        taught = of[clear[rows]]
        mixed = MEMORY * self._looks[taught] + (1 - MEMORY) * seen[rows[clear[rows]]]
        self._looks[taught] = mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-9)
        # Places of weak boxes, such as those of half hidden things, count less; those that score 2/3 count as before.
        self._things.see(of, found, rows, doubt=3 * (1 - np.minimum(found.scores[rows], 0.99).astype(np.float64)))


def _alone(found: Boxes, high: Numbers) -> NDArray[np.bool_]:
    """Say which boxes are sure, and overlap no other sure one much."""
    shared = overlaps(found.boxes[high], found.boxes[high])
    np.fill_diagonal(shared, 0)
    clear = np.zeros(len(found), np.bool_)
    clear[high] = shared.max(1, initial=0) < CROWD
    return clear


def _enlarged(boxes: NDArray[np.floating], share: float) -> NDArray[np.float64]:
    """Return boxes (n, 4) that are larger by a share of their sides on each side."""
    boxes = np.asarray(boxes, np.float64)
    more = (boxes[:, 2:] - boxes[:, :2]) * share
    return np.concatenate([boxes[:, :2] - more, boxes[:, 2:] + more], 1)


class ShortTerm(Steady):
    """DL Streamer's `short-term-imageless`: the same without colours."""

    def __init__(self, options: ShortTermOptions, threshold: float) -> None:
        super().__init__(SteadyOptions(**options.model_dump(), likeness=0.0), threshold)
