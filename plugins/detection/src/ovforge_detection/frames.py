"""A running detector for frames of video, which several threads call: for the task `video`, and others like it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image

from ovforge.model import Boxes, Timings
from ovforge_detection.prepare import Prepared, mode_of, prepare
from ovforge_detection.results import DetectInputs
from ovforge_detection.scaling import Scaler

if TYPE_CHECKING:
    from ovforge_detection.task import Detect

__all__ = ["Frames"]

AHEAD = 2
"""Threads beyond the device's requests: some prepare and decode frames while the others wait for the device."""


class Frames:
    """Finds what `inputs` look for; see `ovforge.contracts.FrameDetector`.

    `threshold` is the score from which a box counts, by default; boxes may be asked for from a lower one on.
    """

    def __init__(self, task: Detect, inputs: DetectInputs) -> None:
        self._task, self._inputs, self._local = task, inputs, threading.local()
        self.notes: list[str] = list(task.spec.notes)
        self._names, self._passages, self._classes = task.looked_for(inputs, Timings(), self.notes)
        self.names: Sequence[str] = list(self._names)
        self.threshold: float = task.spec.threshold
        self.batch: int = task.batch
        self.parallel: int = task.parallel() + AHEAD
        ov.Type.u8.to_dtype()  # OpenVINO 2026.4 never returns from it if two threads call it first
        self._scaler = Scaler(task.spec) if Scaler.serves(task.spec) else None

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Boxes]:
        """Return what is in each frame, RGB (height, width, 3), best first."""
        prepared = [self._prepared(picture) for picture in pictures]
        found = self._worker().find(prepared, self._names, self._passages, self._classes, self._inputs)
        return [Boxes(each.boxes, each.scores, each.classes) for each in found]

    def _prepared(self, picture: NDArray[np.uint8]) -> Prepared:
        if self._scaler:
            return self._scaler(picture)
        image = Image.fromarray(picture).convert(mode_of(self._task.spec))
        return prepare(image, self._task.spec, self._task.fixed_size)

    def _worker(self) -> Detect:
        """Return this thread's own copy of the task: the models are shared, and the requests are not."""
        if not hasattr(self._local, "task"):
            self._local.task = self._task.beside()
        worker: Detect = self._local.task
        return worker
