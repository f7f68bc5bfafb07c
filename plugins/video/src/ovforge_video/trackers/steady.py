"""The default: place, motion, direction and colours, and how sure the detector is of a thing in the long run.

Sure boxes are matched first, then weak ones (ByteTrack, Zhang et al. 2022); then boxes that are made larger about their
middles, so that small and quick things find each other ("Hard to Track Objects with Irregular Motions and Similar
Appearances? Make It Easier by Buffering the Matching Space", Yang et al. 2023), around the prediction and around the
last box, since a prediction may have run away ("Observation-Centric SORT", Cao et al. 2023). The direction that a thing
moved in counts, as in that paper. Two boxes of one thing look alike, and the more so the longer it was away. A thing
begins with sure boxes, and counts while its running mean of scores is not far below theirs: what the detector mostly
doubts is none. The motion believes a box the more the higher its score is ("GIAOTracker", Du et al. 2021).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovforge.model import Boxes, Tracks
from ovforge_video.trackers.colours import BANDS, BINS, likenesses, looks
from ovforge_video.trackers.matching import agreement, assign, inside, middles, overlaps
from ovforge_video.trackers.options import ShortTermOptions, SteadyOptions
from ovforge_video.trackers.tracks import Things, same_class

__all__ = ["ShortTerm", "Steady"]

RATE = 30.0
"""Pictures a second that the deviations of the motion were found for."""
NEAR = 0.3
"""How much of its sides a box grows on each side, as in the paper."""
REACH, FARTHEST, TOUCH = 0.5, 1.5, 0.1
"""How much more it grows for each second that a thing is away, at most, and the overlap that is enough then."""
MEMORY = 0.9
"""What is kept, at each box, of a thing's mean score and of its looks."""
DOUBT = 0.6
"""Share of the threshold that the mean score of a thing that counts may fall to."""
EVEN = 0.5
"""Score from which a box is rather a thing than none: `rise` asks for no more."""
CROWD = 0.3
"""Overlap with another box above which a box shows two things: looks are not learned there."""
SPAN = 5
"""Boxes back to the one that a thing's direction is taken from."""

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]


class Steady:
    """Follows things of one stream; bridges pictures that the detector did not look at."""

    def __init__(self, options: SteadyOptions, threshold: float) -> None:
        self._options, self._threshold = options, threshold
        self._things, self._seconds = Things(), 0.0
        self._means = np.zeros(0)
        self._seen = np.zeros(0)
        """Second at which each thing was seen last."""
        self._looks = np.zeros((0, BANDS * 3 * BINS), np.float32)
        self._past = np.zeros((0, SPAN, 2))
        """Middles of each thing's last boxes, the oldest first."""
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
        return self._things.sure & (self._means >= self._threshold * DOUBT)

    def _match(self, found: Boxes, picture: NDArray[np.uint8], seconds: float) -> None:
        things, options = self._things, self._options
        high = np.flatnonzero(found.scores >= self._threshold)
        weak = np.flatnonzero((found.scores >= options.low) & (found.scores < self._threshold))
        seen = (
            looks(picture, found.boxes)
            if options.likeness
            else np.zeros((len(found), self._looks.shape[1]), np.float32)
        )
        alike, clear = likenesses(self._looks, seen), _alone(found, high)
        places, away = things.motion.boxes(), seconds - self._seen

        def matched(
            which: Numbers, rows: Numbers, at: Floats, grow: Floats | float, *, least: float, like: float, turn: float
        ) -> tuple[Numbers, Numbers]:
            """Give things at these places their boxes, and return the things and the rows that are left."""
            if not (len(which) and len(rows)):
                return which, rows
            grown = np.broadcast_to(grow, len(things))[which]
            shared = overlaps(_enlarged(at[which], grown), _enlarged(found.boxes[rows], float(grown.mean())))
            same = alike[np.ix_(which, rows)]
            value = shared + same
            if turn:
                value = value + turn * agreement(self._past[which], things.boxes[which], found.boxes[rows])
            fits = (shared >= least) & (same >= like)  # without colours all look alike: 0
            able = same_class(things.classes[which], found.classes[rows], options.per_class)
            ours, theirs, left, free = assign(np.where(fits, value, -9.0), -5.0, able)
            self._learn(which[ours], found, rows[theirs], seen, clear, seconds)
            return which[left], rows[free]

        usual = {"least": options.overlap, "like": options.likeness, "turn": options.direction}
        straight = usual | {"turn": 0.0}
        counted, new = np.flatnonzero(things.sure), np.flatnonzero(~things.sure)
        recent = away[counted] <= self._bridge * 1.5
        fresh, lost = counted[recent], counted[~recent]
        fresh, high = matched(fresh, high, places, 0.0, **usual)
        fresh, _ = matched(fresh, weak, places, 0.0, **usual | {"least": options.weak_overlap})
        lost, high = matched(np.concatenate([lost, fresh]), high, places, NEAR, **straight)
        lost, high = matched(lost, high, things.boxes, NEAR, **straight)
        if options.likeness:
            wide = np.minimum(NEAR + REACH * away, FARTHEST)
            _, high = matched(lost, high, places, wide, least=TOUCH, like=options.return_likeness, turn=0.0)
        new, high = matched(new, high, places, 0.0, **usual)
        things.sure |= things.hits >= options.hits
        stays = ~things.sure | (away <= options.keep) | (things.unseen == 0)
        stays[new] = False
        self._begin(found, high, seen, seconds, stays)

    def _begin(
        self, found: Boxes, free: Numbers, seen: NDArray[np.float32], seconds: float, stays: NDArray[np.bool_]
    ) -> None:
        """Drop the things that do not stay, and begin new ones with those of the free boxes that can be one."""
        things, options = self._things, self._options
        least = max(self._threshold, min(self._threshold + options.rise, EVEN))
        begins = free[found.scores[free] >= least]
        there = things.boxes[things.sure & (things.unseen == 0)]
        begins = begins[inside(found.boxes[begins], there).max(1, initial=0) < options.part]
        count = len(begins)
        things.add(found.take(begins), begins, sure=options.hits == 1)
        self._means = np.concatenate([self._means, found.scores[begins]])
        self._seen = np.concatenate([self._seen, np.full(count, seconds)])
        self._looks = np.concatenate([self._looks, seen[begins]])
        self._past = np.concatenate([self._past, np.tile(middles(found.boxes[begins])[:, None], (1, SPAN, 1))])
        kept = np.concatenate([stays, np.ones(count, np.bool_)])
        things.keep(kept)
        self._means, self._seen = self._means[kept], self._seen[kept]
        self._looks, self._past = self._looks[kept], self._past[kept]

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
        self._past[of] = np.concatenate([self._past[of, 1:], middles(found.boxes[rows])[:, None]], 1)
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


def _enlarged(boxes: NDArray[np.floating], share: Floats | float) -> Floats:
    """Return boxes (n, 4) that are larger by a share of their sides, one or (n,), on each side."""
    boxes = np.asarray(boxes, np.float64)
    more = (boxes[:, 2:] - boxes[:, :2]) * np.reshape(share, (-1, 1))
    return np.concatenate([boxes[:, :2] - more, boxes[:, 2:] + more], 1)


class ShortTerm(Steady):
    """DL Streamer's `short-term-imageless`: the same without colours."""

    def __init__(self, options: ShortTermOptions, threshold: float) -> None:
        super().__init__(SteadyOptions(**options.model_dump(), likeness=0.0), threshold)
