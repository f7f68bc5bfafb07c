"""What the task `video` returns: frames as they come, and where they are written to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ovforge.contracts import FrameDetector, Progress, Tracker, ignore_progress
from ovforge.errors import InputError, OvforgeError
from ovforge.model import Boxes, Result
from ovforge_video.describing import Describer
from ovforge_video.drawing import Overlay
from ovforge_video.encoding import SOUND_SUFFIXES, VIDEO_SUFFIXES, Sound, encoder_name
from ovforge_video.engine import Engine, Lane, Sink
from ovforge_video.frame import Frame
from ovforge_video.options import EncodeOptions, VideoOptions
from ovforge_video.reading import Reader
from ovforge_video.reidentify import Reidentifier
from ovforge_video.show import LivePage
from ovforge_video.writers import SUFFIXES, path_of, sink

__all__ = ["VideoResult"]


@dataclass
class VideoResult(Result):
    """Reads its streams when it is iterated, or saved: once, and nothing is kept that was consumed.

    `counts` (frames, seconds, frames per second, things, and where the time went) are there when it has ended, or so
    far.
    """

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    counts: dict[str, Any] = field(default_factory=dict)
    _readers: list[Reader] = field(default_factory=list, repr=False)
    _detector: FrameDetector | None = field(default=None, repr=False)
    _tracker: Callable[[], Tracker] | None = field(default=None, repr=False)
    _options: VideoOptions = field(default_factory=VideoOptions, repr=False)
    _inside: Callable[[Boxes, tuple[int, int]], Boxes] | None = field(default=None, repr=False)
    _describers: Sequence[Describer] = field(default=(), repr=False)
    _reidentifier: Reidentifier | None = field(default=None, repr=False)
    _progress: Callable[[Progress], None] = field(default=ignore_progress, repr=False)
    _used: bool = field(default=False, repr=False)

    @property
    def streams(self) -> list[str]:
        """The names of the streams."""
        return [reader.name for reader in self._readers]

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames of all streams as they are ready, those of each in order, with their pictures."""
        yield from self.run(pictures=True)

    def save(self, path: Path | str) -> list[Path]:
        """Read all, and write .jsonl, .json (COCO-VID), .txt (MOTChallenge), .csv, or a video; return the files.

        `out.mp4` becomes `out-NAME.mp4` if there are several streams. Until it is whole a file is `out.part.mp4`.
        """
        return self.write([path])

    def write(
        self,
        paths: Sequence[Path | str],
        each: Callable[[Frame], None] | None = None,
        *,
        audio: bool = False,
        page: LivePage | None = None,
    ) -> list[Path]:
        """Read all, and write several files of each stream at once; `each` is called with every frame.

        `audio` copies the sound; a `page` shows the streams as they come.
        """
        targets = [Path(path) for path in paths]
        for target in targets:
            self.check_path(target)
            if target.suffix.lower() in VIDEO_SUFFIXES:
                encoder_name(self._options.encode, target)
        if audio and not any(target.suffix.lower() in SOUND_SUFFIXES for target in targets):
            raise InputError("no file that is written can hold sound", where="--audio", hint="Write .mp4 or .mkv.")
        several = len(self._readers) > 1
        files = [path_of(target, reader.name, several) for target in targets for reader in self._readers]
        for frame in self.run(targets, pictures=each is not None, audio=audio, page=page):
            if each is not None:
                each(frame)
        return [file for file in files if file.exists()]

    def run(
        self,
        targets: Sequence[Path] = (),
        *,
        pictures: bool = False,
        audio: bool = False,
        page: LivePage | None = None,
    ) -> Iterator[Frame]:
        """Yield the frames while `targets` are written. Raises InputError if no stream can be read."""
        if self._used:
            raise InputError("the result was read before", where="video", hint="Call the pipeline again.")
        self._used = True
        assert self._detector is not None
        lanes = [Lane(reader, self._tracker, keeps_pictures=pictures) for reader in self._readers]
        for lane in lanes:
            overlay = Overlay(self._options.overlay)
            files = [path_of(target, lane.reader.name, len(lanes) > 1) for target in targets]
            lane.sinks = [_Late(lane.reader, file, self._options.encode, overlay, audio) for file in files]
            lane.sinks += [page.sink(lane.reader.name, overlay)] if page else []
        engine = Engine(
            lanes, self._detector, interval=self._options.interval, inside=self._inside,
            describers=self._describers, reidentifier=self._reidentifier,
        )  # fmt: skip
        things: Counter[str] = Counter()
        seen: set[tuple[str, int]] = set()
        began, done = time.perf_counter(), 0
        try:
            for frame in engine:
                done += 1
                for number, label in zip(frame.ids.tolist(), frame.labels, strict=True):
                    if number and (frame.stream, number) not in seen:
                        seen.add((frame.stream, number))
                        things[label] += 1
                self._progress(Progress("video", done, self._total(done), self._note(done, began)))
                yield frame
        finally:
            self.counts = _counts(engine, lanes, done, time.perf_counter() - began, things)
            self.timings.elapsed = time.perf_counter() - began
            for stage, seconds in self.counts["seconds"].items():
                self.timings.add(stage, seconds)
            if page is not None:
                self.counts["page"] = page.counts
        self._conclude(engine, lanes)

    def lines(self) -> list[str]:
        """Return how many frames and things there are in each stream."""
        if not self.counts:
            return ["not read yet"]
        things = ", ".join(f"{count} {label}" for label, count in self.counts["things"].items()) or "nothing tracked"
        streams = [
            f"{name}: {each['frames']} frames, {each['fps']:.1f} fps" for name, each in self.counts["streams"].items()
        ]
        whole = f"{self.counts['frames']} frames in {self.counts['elapsed']:.2f} s, {self.counts['fps']:.1f} fps"
        return [*streams, f"{whole}; {things}", f"the slowest stage: {self.counts['slowest']}"]

    def is_empty(self) -> bool:
        """Say whether nothing was tracked."""
        return bool(self.counts) and not self.counts["things"]

    def _total(self, done: int) -> int:
        """Return about how many frames there will be."""
        totals = [reader.total for reader in self._readers]
        return max(done, sum(total or 0 for total in totals)) if all(totals) else 0

    def _note(self, done: int, began: float) -> str:
        """Return frames per second and, for files, the time left."""
        rate = done / max(1e-6, time.perf_counter() - began)
        left = self._total(done) - done
        return f"{rate:.1f} fps" + (f", {left / rate:.0f} s left" if left > 0 else "")

    def _conclude(self, engine: Engine, lanes: Sequence[Lane]) -> None:
        """Say what was odd about streams. Raises the first error if no stream came to its end."""
        for place, lane in enumerate(lanes):
            self.warnings += [f"{lane.reader.name}: {note}" for note in lane.reader.notes]
            if dropped := engine.dropped(place):
                self.warnings.append(f"{lane.reader.name}: {dropped} frames came too quickly and were left out")
        failed = [lane for lane in lanes if lane.error is not None]
        if len(failed) == len(lanes) and failed:
            assert failed[0].error is not None
            raise failed[0].error
        for lane in failed:
            if not isinstance(lane.error, OvforgeError):
                assert lane.error is not None
                raise lane.error
            self.warnings.append(f"{lane.reader.name} ended early: {lane.error.what}")


class _Late:
    """A sink that is made with the first frame, when the stream's rate is known."""

    def __init__(self, reader: Reader, path: Path, encode: EncodeOptions, overlay: Overlay, audio: bool) -> None:
        self._reader, self._path, self._encode, self._overlay, self._audio = reader, path, encode, overlay, audio
        self._sink: Sink | None = None

    def write(self, frame: Frame) -> None:
        if self._sink is None:
            audio = self._sound() if self._audio and self._path.suffix.lower() in SOUND_SUFFIXES else None
            self._sink = sink(self._path, self._encode, self._overlay, self._reader.rate, audio)
        self._sink.write(frame)

    def close(self, whole: bool) -> None:
        if self._sink is not None:
            self._sink.close(whole)

    def _sound(self) -> Sound | None:
        """Return the sound that is copied."""
        reader = self._reader
        if reader.has_sound and reader.is_file:
            return Sound(str(reader.source), reader.options.start, reader.passes)
        reader.say("its sound is not copied: it has none, or it is not a file")
        return None


def _counts(engine: Engine, lanes: Sequence[Lane], frames: int, elapsed: float, things: Counter[str]) -> dict[str, Any]:
    seconds = {"infer": engine.infer_seconds}
    for lane in lanes:
        for stage in ("decode", "track", "reidentify", "describe", "write"):
            seconds[stage] = seconds.get(stage, 0.0) + lane.seconds.get(stage, 0.0)
    shares = {stage: spent / (engine.parallel if stage == "infer" else len(lanes)) for stage, spent in seconds.items()}
    streams = {
        lane.reader.name: {
            "frames": lane.frames,
            "fps": lane.frames / max(1e-9, (lane.ended or time.perf_counter()) - lane.began),
        }
        for lane in lanes
    }
    return {
        "frames": frames, "elapsed": elapsed, "fps": frames / max(1e-9, elapsed), "streams": streams,
        "things": dict(things.most_common()), "seconds": seconds, "queues": engine.queues(),
        "slowest": max(shares, key=lambda stage: shares[stage]),
    }  # fmt: skip
