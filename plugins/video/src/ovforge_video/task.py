"""The task `video`: streams through the task that detects, a tracker for each, and what writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ovforge.contracts import FrameDetector, Progress, TaskContext, Tracker
from ovforge.errors import ConfigError
from ovforge.model import Boxes
from ovforge_video.describing import Describer
from ovforge_video.options import VideoInputs, VideoOptions
from ovforge_video.reading import ReadOptions, readers
from ovforge_video.reidentify import Reidentifier
from ovforge_video.result import VideoResult
from ovforge_video.tiling import Tiled

if TYPE_CHECKING:
    from ovforge.contracts import Choice

__all__ = ["Video"]

NO_TRACKER = "none"


class Video:
    """Finds and follows things in several streams at once."""

    def __init__(self, options: VideoOptions, context: TaskContext) -> None:
        assert context.choose is not None
        self._options = options
        detect = context.choose("task", options.detect, "task.detect")
        self._detect = detect.create(context)
        if not hasattr(self._detect, "frames"):
            raise ConfigError(
                f"the task {detect.extension.name!r} does not find things in frames", where="task.detect",
                hint='Leave it out: "detect" does.',
            )  # fmt: skip
        if options.reidentify and options.track == NO_TRACKER:
            raise ConfigError(
                "without a tracker nothing is followed that could come back", where="task.reidentify",
                hint="Leave out reidentify, or choose a tracker.",
            )  # fmt: skip
        self._describers = [Describer(each, f"task.describe.{n}") for n, each in enumerate(options.describe)]
        self._reidentifier = Reidentifier(options.reidentify) if options.reidentify else None
        self._track: Choice | None = None
        if options.track != NO_TRACKER:
            self._track = context.choose("tracker", options.track, "task.track")
            if options.interval > 1 and self._track.extension.every_picture:
                raise ConfigError(
                    f"the tracker {self._track.extension.name!r} needs what is found in each picture",
                    where="task.interval",
                    hint="Set task.interval to 1, or take one that bridges pictures: steady, short-term-imageless.",
                )

    def __call__(self, inputs: VideoInputs, progress: Callable[[Progress], None]) -> VideoResult:
        """Return the result, which reads the streams as it is iterated, or saved.

        Raises InputError for an input that is not there, and what the task that detects raises.
        """
        options = ReadOptions(
            inputs.start, inputs.end, inputs.fps, inputs.size, inputs.again, inputs.loop, inputs.pixels
        )
        given = [inputs.video] if isinstance(inputs.video, str) else inputs.video
        detector, threshold = self._detector(inputs)
        return VideoResult(
            provenance={"inputs": inputs.model_dump(mode="json", exclude_defaults=True)},
            warnings=list(detector.notes),
            _readers=readers(given, inputs.name, options),
            _detector=detector,
            _tracker=self._maker(threshold),
            _options=self._options,
            _inside=_Region(inputs.region) if inputs.region else None,
            _describers=self._describers,
            _reidentifier=self._reidentifier,
            _progress=progress,
        )

    def examples(self, count: int) -> Sequence[VideoInputs]:
        """Return none: calibrate the detector by the task `detect`."""
        return ()

    def _detector(self, inputs: VideoInputs) -> tuple[FrameDetector, float]:
        """Return the detector, and the score of sure boxes."""
        given: dict[str, Any] = {"text": inputs.text, "nms": inputs.nms, "limit": 300}
        lowest = inputs.threshold
        if self._track is not None:
            lowest = min(self._options.lowest, inputs.threshold or 1.0)
        detector: FrameDetector = self._detect.frames(**given, threshold=lowest)
        if self._options.tiles > 1:
            detector = Tiled(detector, self._options.tiles)
        return detector, detector.threshold if inputs.threshold is None else inputs.threshold

    def _maker(self, threshold: float) -> Callable[[], Tracker] | None:
        track = self._track
        return None if track is None else lambda: track.create(threshold)


class _Region:
    """Keeps the boxes whose middle lies in a polygon. Source: the even-odd rule."""

    def __init__(self, corners: Sequence[tuple[float, float]]) -> None:
        self._corners = np.array(corners, np.float64)

    def __call__(self, found: Boxes, size: tuple[int, int]) -> Boxes:
        """Return those of the boxes; `size` is the frame's width and height."""
        middles = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2 / np.array(size)
        x, y = middles[:, :1], middles[:, 1:]
        (x1, y1), (x2, y2) = self._corners.T, np.roll(self._corners, -1, 0).T
        between = (y1 > y) != (y2 > y)
        slope = np.divide(x2 - x1, y2 - y1, out=np.zeros_like(x1), where=y2 != y1)
        crossed = between & (x < x1 + (y - y1) * slope)
        return found.take(crossed.sum(1) % 2 == 1)
