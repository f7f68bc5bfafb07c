"""The task `video` beside a plain chain of the same model, and beside decoding alone; and how well it follows people.

    python benchmarks/video.py VIDEO MODEL PROC [--frames 300] [--streams 4] [--interval 1]
    python benchmarks/video.py VIDEO MODEL PROC --truth gt.txt      # MOT15's form; needs motmetrics

All take turns in one process on the same frames. The plain chain is PyAV, the task `detect`'s own model call frame by
frame, and ByteTrack. Ratios count; figures depend on the machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

import ovforge
from ovforge.model import Boxes
from ovforge_video.trackers.byte_track import ByteTrack
from ovforge_video.trackers.options import ByteTrackOptions


def make(arguments: argparse.Namespace, **task: Any) -> ovforge.Pipeline:
    """Return a pipeline of the task."""
    load = {"source": str(arguments.model.resolve()), "use": "model-proc", "proc": str(arguments.proc.resolve())}
    device = {"use": "cpu", "hint": "throughput"}
    return ovforge.load({"task": {"use": "video", **task}, "load": load, "device": device, "input": {"video": "-"}})


def decoded(video: Path, frames: int) -> int:
    """Decode alone; return the number of frames."""
    count = 0
    with av.open(str(video)) as container:
        for count, frame in enumerate(container.decode(video=0), start=1):
            frame.to_ndarray(format="rgb24")
            if count == frames:
                break
    return count


def plain(pipe: ovforge.Pipeline, video: Path, frames: int) -> int:
    """Decode, detect and track, one after the other."""
    task: Any = pipe.task
    detector = task._detect.frames(text="person", threshold=0.1)
    tracker, count = ByteTrack(ByteTrackOptions(), detector.threshold), 0
    with av.open(str(video)) as container:
        for count, frame in enumerate(container.decode(video=0), start=1):
            picture = frame.to_ndarray(format="rgb24")
            found: Boxes = detector([picture])[0]
            tracker.update(found, picture, count / 25)
            if count == frames:
                break
    return count


def streamed(pipe: ovforge.Pipeline, videos: list[str], frames: int) -> int:
    """Run the task; return the number of frames."""
    rate = frame_rate(Path(videos[0]))
    names = [f"s{n}" for n in range(len(videos))]
    return sum(1 for _ in pipe(video=videos, name=names, text="person", end=frames / rate))


def frame_rate(video: Path) -> float:
    """Return the frames of a second."""
    with av.open(str(video)) as container:
        return float(container.streams.video[0].average_rate or 25)


def followed(pipe: ovforge.Pipeline, video: Path, truth: Path) -> Any:
    """Return IDF1, MOTA and switches at an overlap of a half, by motmetrics."""
    if not hasattr(np, "asfarray"):
        np.asfarray = lambda values, dtype=np.float64: np.asarray(values, dtype)  # motmetrics 1.4.0 asks for it
    import motmetrics

    expected = np.loadtxt(truth, delimiter=",")
    expected = expected[expected[:, 6] != 0]
    events = motmetrics.MOTAccumulator(auto_id=True)
    for frame in pipe(video=str(video), text="person"):
        theirs = expected[expected[:, 0] == frame.number + 1]
        ours = np.column_stack([frame.boxes[:, :2], frame.boxes[:, 2:] - frame.boxes[:, :2]]).astype(np.float64)
        apart = motmetrics.distances.iou_matrix(theirs[:, 2:6], ours, max_iou=0.5)
        events.update(theirs[:, 1].astype(int), frame.ids, apart)
    return motmetrics.metrics.create().compute(events, metrics=["idf1", "mota", "num_switches"], name="video")


def main() -> None:
    """Measure, in turns, and print frames per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("video", "model", "proc"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--truth", type=Path)
    arguments = parser.parse_args()
    pipe = make(arguments, interval=arguments.interval)
    if arguments.truth:
        print(followed(pipe, arguments.video, arguments.truth))
        return
    one = [str(arguments.video.resolve())]
    runs = {
        "decode alone": lambda frames: decoded(arguments.video, frames),
        "plain chain": lambda frames: plain(pipe, arguments.video, frames),
        "video, 1 stream": lambda frames: streamed(pipe, one, frames),
        f"video, {arguments.streams} streams": lambda frames: streamed(pipe, one * arguments.streams, frames),
    }
    best = dict.fromkeys(runs, 0.0)
    for run in runs.values():
        run(2)  # what is compiled and imported at first counts for none
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            best[name] = max(best[name], run(arguments.frames) / (time.perf_counter() - begin))
    for name, rate in best.items():
        print(f"{name:18} {rate:8.1f} fps   {rate / best['plain chain']:5.2f} x the plain chain")


if __name__ == "__main__":
    main()
