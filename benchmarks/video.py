"""The task `video` beside a plain chain of the same model, and beside its limits; and how well it follows people.

    python benchmarks/video.py VIDEO MODEL PROC [--frames 300] [--streams 4] [--interval 1]
    python benchmarks/video.py VIDEO MODEL PROC --truth gt.txt --track steady sort    # MOT15's form; needs trackeval

All take turns in one process on the same frames. The plain chain is PyAV, the task `detect`'s own model call frame by
frame, and ByteTrack. The limits are decoding alone, the model alone (all its requests busy, as benchmark_app measures
it), and drawing and encoding alone. Ratios count; figures depend on the machine.

TrackEval 1.3 asks for opencv-python, which brings the same module as the opencv-python-headless that is used here:
`pip install --no-deps trackeval` and its other needs (matplotlib, pycocotools, tabulate).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import openvino as ov

import ovforge
from ovforge.model import Boxes
from ovforge_video.drawing import Overlay
from ovforge_video.options import EncodeOptions, OverlayOptions
from ovforge_video.trackers.byte_track import ByteTrack
from ovforge_video.trackers.matching import overlaps
from ovforge_video.trackers.options import ByteTrackOptions
from ovforge_video.writers import Video


def make(arguments: argparse.Namespace, **task: Any) -> ovforge.Pipeline:
    """Return a pipeline of the task."""
    load = {"source": str(arguments.model.resolve()), "use": "model-proc", "proc": str(arguments.proc.resolve())}
    device = {"use": "cpu", "hint": "throughput"}
    return ovforge.load({"task": {"use": "video", **task}, "load": load, "device": device, "input": {"video": "-"}})


def pictures(video: Path, frames: int) -> Any:
    """Yield the frames as RGB."""
    with av.open(str(video)) as container:
        for count, frame in enumerate(container.decode(video=0), start=1):
            yield frame.to_ndarray(format="rgb24")
            if count == frames:
                return


def decoded(video: Path, frames: int) -> int:
    """Decode alone; return the number of frames."""
    return sum(1 for _ in pictures(video, frames))


def inferred(model: ov.CompiledModel, frames: int) -> int:
    """Run the model alone on random input, all requests busy; return the number of frames."""
    queue = ov.AsyncInferQueue(model)
    shape = [1 if side.is_dynamic else side.get_length() for side in model.input(0).get_partial_shape()]
    given = np.random.default_rng(0).random(shape).astype(model.input(0).get_element_type().to_dtype())
    for _ in range(frames):
        queue.start_async({0: given}, share_inputs=True)
    queue.wait_all()
    return frames


def encoded(held: list[Any], folder: Path) -> int:
    """Draw and encode frames that are in memory; return their number."""
    video = Video(folder / "alone.mp4", EncodeOptions(), Overlay(OverlayOptions()), Fraction(25))
    for frame in held:
        video.write(frame)
    video.close(whole=True)
    return len(held)


def plain(pipe: ovforge.Pipeline, video: Path, frames: int) -> int:
    """Decode, detect and track, one after the other."""
    task: Any = pipe.task
    detector = task._detect.frames(text="person", threshold=0.1)
    tracker, count = ByteTrack(ByteTrackOptions(), detector.threshold), 0
    for count, picture in enumerate(pictures(video, frames), start=1):
        found: Boxes = detector([picture])[0]
        tracker.update(found, picture, count / 25)
    return count


def streamed(pipe: ovforge.Pipeline, videos: list[str], frames: int, outputs: list[Path] | None = None) -> int:
    """Run the task; return the number of frames."""
    rate = frame_rate(Path(videos[0]))
    result: Any = pipe(
        video=videos, name=[f"s{n}" for n in range(len(videos))], text="person", end=(frames - 0.5) / rate
    )
    result.write(outputs or [])
    return int(result.counts["frames"])


def frame_rate(video: Path) -> float:
    """Return the frames of a second."""
    with av.open(str(video)) as container:
        return float(container.streams.video[0].average_rate or 25)


def followed(pipe: ovforge.Pipeline, video: Path, truth: Path, threshold: float | None) -> dict[str, float]:
    """Return HOTA, IDF1, MOTA and switches, by TrackEval; the last three at an overlap of a half."""
    from trackeval.metrics import CLEAR, HOTA, Identity

    expected = np.loadtxt(truth, delimiter=",")
    expected = expected[expected[:, 6] != 0]
    numbers: tuple[dict[int, int], dict[int, int]] = {}, {}
    ids: tuple[list[Any], list[Any]] = [], []
    shared = []
    given = {} if threshold is None else {"threshold": threshold}
    for frame in pipe(video=str(video), text="person", **given):
        theirs = expected[expected[:, 0] == frame.number + 1]
        corners = np.column_stack([theirs[:, 2:4], theirs[:, 2:4] + theirs[:, 4:6]])
        shared.append(overlaps(corners, frame.boxes))
        for known, all_, now in zip(numbers, ids, (theirs[:, 1].astype(int), frame.ids), strict=True):
            all_.append(np.array([known.setdefault(number, len(known)) for number in now.tolist()], int))
    data = {
        "num_timesteps": len(shared), "gt_ids": ids[0], "tracker_ids": ids[1], "similarity_scores": shared,
        "num_gt_ids": len(numbers[0]), "num_tracker_ids": len(numbers[1]),
        "num_gt_dets": sum(map(len, ids[0])), "num_tracker_dets": sum(map(len, ids[1])),
    }  # fmt: skip
    quiet = {"PRINT_CONFIG": False, "THRESHOLD": 0.5}
    clear, identity = CLEAR(quiet).eval_sequence(data), Identity(quiet).eval_sequence(data)
    hota = float(np.mean(HOTA().eval_sequence(data)["HOTA"]))
    return {"HOTA": hota, "IDF1": identity["IDF1"], "MOTA": clear["MOTA"], "switches": int(clear["IDSW"])}


def judge(arguments: argparse.Namespace) -> None:
    """Print how well trackers follow, at several thresholds and intervals."""
    print(f"{'tracker':22} {'threshold':>9} {'interval':>8} {'HOTA':>6} {'IDF1':>6} {'MOTA':>6} {'switches':>8}")
    for track in arguments.track:
        for interval in arguments.intervals:
            try:
                pipe = make(arguments, interval=interval, track=track)
            except ovforge.errors.ConfigError:
                continue  # it needs each picture
            for threshold in arguments.threshold or [None]:
                found = followed(pipe, arguments.video, arguments.truth, threshold)
                figures = " ".join(f"{found[name]:6.3f}" for name in ("HOTA", "IDF1", "MOTA"))
                said = "its own" if threshold is None else f"{threshold:g}"
                print(f"{track:22} {said:>9} {interval:8} {figures} {found['switches']:8}", flush=True)


def compare(arguments: argparse.Namespace) -> None:
    """Measure speeds in turns, and print the best of each."""
    pipe, bridged = make(arguments), make(arguments, interval=arguments.interval)
    model = ov.Core().compile_model(arguments.model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    video, one = arguments.video, [str(arguments.video.resolve())]
    count = min(arguments.frames, 200)
    found = pipe(video=one, text="person", end=(count - 0.5) / frame_rate(video))
    held = [replace(frame, picture=picture) for frame, picture in zip(found, pictures(video, count), strict=True)]
    with tempfile.TemporaryDirectory() as name:
        folder, several = Path(name), f"video, {arguments.streams} streams"
        runs: dict[str, Callable[[int], int]] = {
            "decode alone": lambda frames: decoded(video, frames),
            "model alone": lambda frames: inferred(model, frames),
            "draw, encode alone": lambda frames: encoded(held[:frames], folder),
            "plain chain": lambda frames: plain(pipe, video, frames),
            "video, 1 stream": lambda frames: streamed(pipe, one, frames),
            "video, 1 stream, encoded": lambda frames: streamed(pipe, one, frames, [folder / "out.mp4"]),
            several: lambda frames: streamed(pipe, one * arguments.streams, frames),
        }
        if arguments.interval > 1:
            runs[f"video, interval {arguments.interval}"] = lambda frames: streamed(bridged, one, frames)
        best, processor = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0.0)
        for run in runs.values():
            run(2)  # what is compiled and imported at first counts for none
        for _ in range(arguments.rounds):
            for label, run in runs.items():
                begin, spent = time.perf_counter(), time.process_time()
                done = run(arguments.frames)
                rate = done / (time.perf_counter() - begin)
                if rate > best[label]:
                    best[label], processor[label] = rate, (time.process_time() - spent) / done * 1e3
    for label, rate in best.items():
        times = f"{rate / best['plain chain']:6.2f} x the plain chain"
        print(f"{label:26} {rate:8.1f} fps   {times}   {processor[label]:6.1f} ms of processor time a frame")
    slowest = min(best["decode alone"], best["model alone"])
    print(f"{several}: {best[several] / slowest:.2f} of the slowest stage alone")
    cost = processor["video, 1 stream, encoded"] - processor["video, 1 stream"]
    print(f"encoding costs {cost:.1f} ms of processor time a frame; alone {processor['draw, encode alone']:.1f} ms")


def main() -> None:
    """Judge trackers if there is a truth, and measure speeds if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("video", "model", "proc"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--track", nargs="+", default=["steady"])
    parser.add_argument("--intervals", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threshold", nargs="+", type=float)
    arguments = parser.parse_args()
    if arguments.truth:
        judge(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
