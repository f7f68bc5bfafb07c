"""Streams through a detector and trackers, in threads with bounded queues between them.

A thread for each stream reads; `parallel` threads detect, for all streams; a thread for each stream tracks, and one
more draws and encodes. A reader leaves, in the stream's order, a promise of what the detector will find, so that order
is kept whatever detector threads do, and a full queue stops the reader.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import FrameDetector, Tracker
from ovforge.errors import OvforgeError
from ovforge.model import Boxes, Tracks
from ovforge_video.describing import Describer, Memory
from ovforge_video.frame import Frame
from ovforge_video.pipes import Pipe
from ovforge_video.reading import Reader, Shot
from ovforge_video.reidentify import Identities, Reidentifier

__all__ = ["Engine", "Lane", "Sink"]

DEPTH = 8
"""Frames of a stream that wait for the detector, and so many again for each later stage."""


class Sink(Protocol):
    """Takes the frames of one stream, in order, in a thread of its own."""

    def write(self, frame: Frame) -> None:
        """Take the next frame."""
        ...

    def close(self, whole: bool) -> None:
        """End; `whole` says whether the stream came to its end."""
        ...


@dataclass
class Lane:
    """All that belongs to one stream."""

    reader: Reader
    make_tracker: Callable[[], Tracker] | None
    sinks: Sequence[Sink] = ()
    keeps_pictures: bool = False
    error: BaseException | None = None
    frames: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by stage: decode, track, write."""
    began: float = 0.0
    ended: float = 0.0

    def spend(self, stage: str, since: float) -> float:
        """Count the time since a reading of the clock, and return another one."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now


Promise = Future[Boxes]


@dataclass(frozen=True)
class _Waiting:
    shot: Shot
    found: Promise | None


class Engine:
    """Runs lanes; iterating yields the frames of all, those of each in order. Its threads end when it is left."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        detector: FrameDetector,
        *,
        interval: int = 1,
        inside: Callable[[Boxes, tuple[int, int]], Boxes] | None = None,
        describers: Sequence[Describer] = (),
        reidentifier: Reidentifier | None = None,
        depth: int = DEPTH,
    ) -> None:
        self.lanes, self._detector, self._interval, self._inside = lanes, detector, interval, inside
        self._describers, self._reidentifier = describers, reidentifier
        self._work: Pipe[tuple[NDArray[np.uint8], Promise]] = Pipe(max(2, detector.parallel * detector.batch * 2))
        self._results: Pipe[Frame] = Pipe(max(2, depth))
        self._waiting: list[Pipe[_Waiting]] = [Pipe(depth) for _ in lanes]
        self._writing: list[Pipe[Frame]] = [Pipe(depth) for _ in lanes]
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.infer_seconds, self.infer_frames = 0.0, 0

    def __iter__(self) -> Iterator[Frame]:
        names = range(len(self.lanes))
        readers = [threading.Thread(target=self._read, args=(n,), name=f"read-{n}", daemon=True) for n in names]
        trackers = [threading.Thread(target=self._track, args=(n,), name=f"track-{n}", daemon=True) for n in names]
        writers = [threading.Thread(target=self._write, args=(n,), name=f"write-{n}", daemon=True) for n in names]
        workers = [threading.Thread(target=self._infer, name=f"infer-{n}", daemon=True) for n in range(self.parallel)]
        self._running = len(self.lanes)
        for thread in (*workers, *writers, *trackers, *readers):
            thread.start()
        try:
            yield from self._results
        finally:
            self._stop.set()
            self._results.close(tear=True)
            self._work.close(tear=True)
            for pipe in self._waiting:
                pipe.close(tear=True)
            for thread in (*readers, *trackers, *writers, *workers):
                thread.join()

    @property
    def parallel(self) -> int:
        """How many threads detect."""
        return max(1, self._detector.parallel)

    def queues(self) -> dict[str, float]:
        """Return how full each queue was on average, 0..1: the stage after a full one is the bottleneck."""
        count = max(1, len(self.lanes))
        return {
            "infer": self._work.filled,
            "track": sum(pipe.filled for pipe in self._waiting) / count,
            "write": sum(pipe.filled for pipe in self._writing) / count,
            "consumer": self._results.filled,
        }

    def dropped(self, place: int) -> int:
        """Return how many frames of a live stream came too quickly."""
        return self._waiting[place].dropped

    # -- threads --------------------------------------------------------------------------------------------------

    def _read(self, place: int) -> None:
        lane, pipe = self.lanes[place], self._waiting[place]
        clock = lane.began = time.perf_counter()
        try:
            with contextlib.closing(lane.reader.shots(self._stop.is_set)) as shots:
                for shot in shots:
                    clock = lane.spend("decode", clock)
                    wanted = shot.number % self._interval == 0
                    promise: Promise | None = Future() if wanted else None
                    taken = pipe.put(_Waiting(shot, promise), drop=lane.reader.live)
                    if taken and promise is not None:
                        self._work.put((shot.picture, promise))
                    elif pipe.closed:
                        return
                    clock = lane.spend("wait", clock)
        except BaseException as error:
            lane.error = error
        finally:
            pipe.close()

    def _infer(self) -> None:
        while taken := self._work.take(self._detector.batch):
            clock = time.perf_counter()
            try:
                found = self._detector([picture for picture, _ in taken])
            except BaseException as error:
                for _, promise in taken:
                    promise.set_exception(error)
                continue
            for (_, promise), boxes in zip(taken, found, strict=True):
                promise.set_result(boxes)
            with self._lock:
                self.infer_seconds += time.perf_counter() - clock
                self.infer_frames += len(taken)

    def _track(self, place: int) -> None:
        lane, pipe = self.lanes[place], self._waiting[place]
        tracker, session, first, last = None, -1, 0, 0
        memory = None
        identities = Identities(self._reidentifier) if self._reidentifier is not None else None
        try:
            for waiting in pipe:
                shot = waiting.shot
                clock = time.perf_counter()
                found = self._result(waiting.found)
                clock = lane.spend("infer", clock)
                if self._inside is not None and found is not None:
                    found = self._inside(found, (shot.picture.shape[1], shot.picture.shape[0]))
                if shot.session != session:
                    tracker = lane.make_tracker() if lane.make_tracker else None
                    session, first = shot.session, last
                frame = _frame(lane, shot, found, tracker, self._detector.names, first)
                clock = lane.spend("track", clock)
                last = max(last, int(frame.ids.max(initial=0)))
                if identities is not None and tracker is not None:
                    frame = identities(frame)
                    clock = lane.spend("reidentify", clock)
                if self._describers:
                    memory = memory or Memory(self._describers)
                    frame = replace(frame, details=memory(frame))
                    lane.spend("describe", clock)
                lane.frames += 1
                if not self._writing[place].put(frame) or not self._results.put(_kept(frame, lane)):
                    return
        except CancelledError:
            return
        except BaseException as error:
            lane.error = lane.error or error
            pipe.close(tear=True)
        finally:
            self._writing[place].close()

    def _result(self, promise: Promise | None) -> Boxes | None:
        """Return what the detector found, waiting for it as long as the engine runs."""
        if promise is None:
            return None
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                return promise.result(timeout=0.2)
        raise CancelledError

    def _write(self, place: int) -> None:
        lane, pipe = self.lanes[place], self._writing[place]
        try:
            for frame in pipe:
                clock = time.perf_counter()
                for sink in lane.sinks:
                    sink.write(frame)
                lane.spend("write", clock)
        except BaseException as error:
            lane.error = lane.error or error
            pipe.close(tear=True)
            self._waiting[place].close(tear=True)
        finally:
            for sink in lane.sinks:
                try:
                    sink.close(lane.error is None and not self._stop.is_set())
                except BaseException as error:
                    lane.error = lane.error or error
            lane.ended = time.perf_counter()
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._results.close()
                    self._work.close()


def _frame(
    lane: Lane, shot: Shot, found: Boxes | None, tracker: Tracker | None, names: Sequence[str], first: int
) -> Frame:
    if tracker is None:
        boxes = found if found is not None else Boxes.none()
        count = len(boxes)
        rows = np.arange(count)
        tracks = Tracks(boxes.boxes, boxes.scores, boxes.classes, np.zeros(count, np.int64), rows)
    else:
        tracks = tracker.update(found, shot.picture, shot.seconds)
        if not isinstance(tracks, Tracks):
            raise OvforgeError(f"the tracker returns {type(tracks).__name__}, not Tracks", where="task.track")
    height, width = shot.picture.shape[:2]
    limits = np.array([width, height] * 2, np.float32)
    boxes_inside = np.clip(tracks.boxes, 0, limits)
    order = np.argsort(tracks.ids, kind="stable") if tracker is not None else np.arange(len(tracks))
    ids = np.where(tracks.ids > 0, tracks.ids + first, 0)
    return Frame(
        lane.reader.name, shot.number, shot.seconds, (width, height), boxes_inside[order], tracks.scores[order],
        tracks.classes[order], ids[order], tracks.rows[order] >= 0, names,
        shot.session, picture=shot.picture,
    )  # fmt: skip


def _kept(frame: Frame, lane: Lane) -> Frame:
    """Return a frame as the consumer gets it: without its picture, unless that was asked for."""
    if lane.keeps_pictures:
        return frame
    return replace(frame, picture=None)
