"""Things that come back, known by an embedding of how they look, whichever tracker follows them.

Source: the gallery of appearances and its cosine distance of "Simple Online and Realtime Tracking with a Deep
Association Metric" (Wojke et al. 2017); the running mean of embeddings of "Towards Real-Time Multi-Object Tracking"
(Wang et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ConfigError
from ovforge_video.describing import Describer, part_of
from ovforge_video.frame import Frame
from ovforge_video.options import ReidentifyOptions
from ovforge_video.trackers.matching import assign, overlaps

__all__ = ["Identities", "Reidentifier"]

Look = NDArray[np.float64] | None
"""An embedding (k,) of length 1, or None for none."""
MEMORY = 0.9
"""What is kept, at each look, of the mean embedding of a thing."""
CROWD = 0.3
"""Overlap with another thing above which a box shows two: nothing is learned there."""


class Reidentifier:
    """The model, which streams share, and what its embeddings are compared by."""

    def __init__(self, options: ReidentifyOptions) -> None:
        self.options, where = options, "task.reidentify"
        self._describer = Describer(options, where)
        names = self._describer.embeddings
        if len(names) != 1:
            raise ConfigError(
                f"the model has {len(names)} embeddings, not one", where=f"{where}.proc",
                hint='Give one output of its model-proc the converter "raw_data_copy".',
            )  # fmt: skip
        self._name = names[0]

    def looker(self) -> Looker:
        """Return what one thread looks with."""
        return Looker(self._describer, self._name)


class Looker:
    """Embeds parts of pictures, for one thread."""

    def __init__(self, describer: Describer, name: str) -> None:
        self._describer, self._name, self._request = describer, name, describer.request()

    def __call__(self, picture: NDArray[np.uint8], box: NDArray[np.float32]) -> Look:
        """Return the embedding (k,), of length 1, of a box of a picture; None for a box of no pixel, or a null one."""
        part = part_of(picture, box)
        if part is None:
            return None
        values = np.array(self._describer.describe(self._request, part)[self._name]["data"], np.float64)
        length = float(np.linalg.norm(values))
        return values / length if np.isfinite(length) and length > 0 else None


@dataclass
class _Thing:
    number: int
    looked: int
    """Frame at which the model looked last."""
    seen: float
    mean: Look


class Identities:
    """Gives the things of one stream their numbers: those that they had, if they come back; for one thread."""

    def __init__(self, reidentifier: Reidentifier) -> None:
        self._options, self._look = reidentifier.options, reidentifier.looker()
        self._known: dict[int, _Thing] = {}
        """By the tracker's last number for a thing."""
        self._last, self._frame = 0, 0

    def __call__(self, frame: Frame) -> Frame:
        """Return a frame, which has its picture and the tracker's numbers, with the numbers that things had before."""
        self._frame += 1
        seconds, ids, labels, clear = frame.seconds, frame.ids.tolist(), frame.labels, _alone(frame)
        self._known = {n: each for n, each in self._known.items() if seconds - each.seen <= self._options.memory}
        looks: dict[int, Look] = {}
        for n, number in enumerate(ids):
            thing = self._known.get(number)
            if thing is None:
                looks[n] = self._embedding(frame, n, labels[n])
                continue
            thing.seen = seconds
            if clear[n] and self._frame - thing.looked >= self._options.every:
                self._learn(thing, self._embedding(frame, n, labels[n]))
        self._recognize(looks, ids, seconds)
        numbers = np.array([self._known[number].number for number in ids], np.int64)
        order = np.argsort(numbers, kind="stable")
        return replace(
            frame, ids=numbers[order], boxes=frame.boxes[order], scores=frame.scores[order],
            classes=frame.classes[order], found=frame.found[order],
        )  # fmt: skip

    def _recognize(self, looks: Mapping[int, Look], ids: Sequence[int], seconds: float) -> None:
        """Find who the things are that the tracker sees for the first time."""
        places = list(looks)
        away = [number for number, each in self._known.items() if number not in ids and each.mean is not None]
        alike = np.full((len(places), len(away)), -2.0)
        for row, place in enumerate(places):
            for column, number in enumerate(away):
                ours, theirs = looks[place], self._known[number].mean
                if ours is not None and theirs is not None:
                    alike[row, column] = float(ours @ theirs)
        rows, columns, _, _ = assign(alike, self._options.likeness)
        who = dict(zip(rows.tolist(), columns.tolist(), strict=True))
        for row, place in enumerate(places):
            if row in who:
                thing = self._known.pop(away[who[row]])
                thing.seen = seconds
                self._learn(thing, looks[place])
            else:
                self._last += 1
                thing = _Thing(self._last, self._frame, seconds, looks[place])
            self._known[ids[place]] = thing

    def _learn(self, thing: _Thing, look: Look) -> None:
        if look is None:
            return
        mixed = look if thing.mean is None else MEMORY * thing.mean + (1 - MEMORY) * look
        thing.mean, thing.looked = mixed / max(float(np.linalg.norm(mixed)), 1e-9), self._frame

    def _embedding(self, frame: Frame, n: int, label: str) -> Look:
        assert frame.picture is not None
        wanted = not self._options.labels or label in self._options.labels
        return self._look(frame.picture, frame.boxes[n]) if wanted and frame.found[n] else None


def _alone(frame: Frame) -> NDArray[np.bool_]:
    """Say which things overlap no other much."""
    shared = overlaps(frame.boxes, frame.boxes)
    np.fill_diagonal(shared, 0)
    return np.asarray(shared.max(1, initial=0) < CROWD)
