"""What a stream is written to: JSON lines, MOT text, COCO-VID-like JSON, CSV, annotated video."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from ovforge.errors import InputError
from ovforge.store import csv_table
from ovforge_video.drawing import Overlay
from ovforge_video.encoding import VIDEO_SUFFIXES, Encoder, Sound
from ovforge_video.frame import Frame
from ovforge_video.options import EncodeOptions

__all__ = ["SUFFIXES", "Lines", "Video", "path_of", "sink"]

_LINES = (".jsonl", ".txt", ".csv", ".json")
SUFFIXES = (".jsonl", *VIDEO_SUFFIXES, ".json", ".txt", ".csv")
"""Endings of what can be written, the default first."""


def path_of(target: Path, stream: str, several: bool) -> Path:
    """Return the file of one stream: `out.mp4` becomes `out-NAME.mp4` if there are several."""
    return target.with_stem(f"{target.stem}-{stream}") if several else target


def _part(path: Path) -> Path:
    """Return the name that a file has until it is whole; it keeps its ending, so that what is there can be played."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


class Lines:
    """Writes a line or more for each frame, whole ones only. Until the end the file is `NAME.part.ENDING`."""

    def __init__(self, path: Path) -> None:
        self._path, self._kind, self._number = path, path.suffix.lower(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _part(path).open("wb", buffering=0)
        self._whole = 0
        self._coco = _Coco() if self._kind == ".json" else None
        if self._kind == ".csv":
            self._put(csv_table([_COLUMNS]))
        if self._coco is not None:
            self._put('{"images": [\n')

    def write(self, frame: Frame) -> None:
        """Write a frame. Raises InputError if the disk is full; what was written is then whole."""
        if self._coco is not None:
            self._put((",\n" if self._number else "") + json.dumps(self._coco.add(frame)))
        elif self._kind == ".jsonl":
            self._put(json.dumps(frame.as_json(), ensure_ascii=False) + "\n")
        elif self._kind == ".csv":
            self._put(csv_table(_rows(frame)))
        else:
            self._put("".join(_mot(frame)))
        self._number += 1

    def close(self, whole: bool) -> None:
        """End the file, and give it its name if it is whole."""
        try:
            if self._coco is not None:
                self._put('\n], "annotations": [\n')
                for part in self._coco.annotations():
                    self._put(part)
                self._put(f"\n], {json.dumps(self._coco.rest(), ensure_ascii=False)[1:]}\n")
        finally:
            self._file.close()
        if whole:
            _part(self._path).replace(self._path)

    def _put(self, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._whole)
            raise InputError(
                f"it cannot be written: {error.strerror}", where=str(self._path),
                hint=f"Make room. What is whole is in {_part(self._path).name}.",
            ) from error  # fmt: skip
        self._whole = self._file.tell()


class Video:
    """Writes annotated frames. Until the end the file is `NAME.part.ENDING`, and can be played."""

    def __init__(
        self, path: Path, encode: EncodeOptions, overlay: Overlay, rate: Fraction, audio: Sound | None = None
    ) -> None:
        self._path, self._overlay, self._frames = path, overlay, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._encoder = Encoder(_part(path), encode, rate, audio)

    def write(self, frame: Frame) -> None:
        """Draw and encode a frame."""
        self._encoder.write(self._overlay(frame), frame.seconds)
        self._frames += 1

    def close(self, whole: bool) -> None:
        """End the file, and give it its name if it is whole."""
        self._encoder.close()
        if whole and self._frames:
            _part(self._path).replace(self._path)


_COLUMNS = ["stream", "frame", "time", "id", "label", "score", "left", "top", "right", "bottom", "details"]


def _rows(frame: Frame) -> list[list[str]]:
    things = zip(
        frame.ids.tolist(), frame.labels, frame.scores.tolist(), frame.boxes.tolist(), frame.words, strict=True
    )
    head = [frame.stream, str(frame.number), f"{frame.seconds:.4f}"]
    return [
        [
            *head,
            str(n),
            label,
            f"{score:.4f}",
            *(f"{v:.2f}" for v in box),
            "; ".join(f"{k}={v}" for k, v in words.items()),
        ]
        for n, label, score, box, words in things
    ]


def _mot(frame: Frame) -> list[str]:
    """Return MOTChallenge's lines: frame from 1 on, id, left, top, width, height, score, and -1 three times."""
    lines = []
    for number, score, (left, top, right, bottom) in zip(
        frame.ids.tolist(), frame.scores.tolist(), frame.boxes.tolist(), strict=True
    ):
        place = f"{left:.2f},{top:.2f},{right - left:.2f},{bottom - top:.2f}"
        lines.append(f"{frame.number + 1},{number or -1},{place},{score:.4f},-1,-1,-1\n")
    return lines


class _Coco:
    """COCO-VID's form as it grows: annotations wait in a file of their own, since images stand before them."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._tracks: dict[int, int] = {}
        self._video: dict[str, Any] = {}
        self._count = 0
        self._waiting = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115

    def add(self, frame: Frame) -> dict[str, Any]:
        """Take a frame's annotations, and return its image."""
        width, height = frame.size
        self._video = {"id": 1, "name": frame.stream, "width": width, "height": height}
        for n, (box, label) in enumerate(zip(frame.boxes.tolist(), frame.labels, strict=True)):
            self._count += 1
            category, number = self._names.setdefault(label, len(self._names) + 1), int(frame.ids[n])
            if number:
                self._tracks.setdefault(number, category)
            left, top, right, bottom = box
            annotation = {
                "id": self._count, "image_id": frame.number + 1, "video_id": 1, "category_id": category,
                "instance_id": number, "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
                "area": round((right - left) * (bottom - top), 2), "iscrowd": 0,
                "score": round(float(frame.scores[n]), 4),
                **({"attributes": frame.details[n]} if frame.details else {}),
            }  # fmt: skip
            self._waiting.write((",\n" if self._count > 1 else "") + json.dumps(annotation))
        return {
            "id": frame.number + 1, "video_id": 1, "frame_id": frame.number, "time": round(frame.seconds, 4),
            "width": width, "height": height,
        }  # fmt: skip

    def annotations(self) -> Iterator[str]:
        """Yield the annotations, in parts; once."""
        self._waiting.seek(0)
        while part := self._waiting.read(2**20):
            yield part
        self._waiting.close()

    def rest(self) -> dict[str, Any]:
        """Return what stands behind images and annotations."""
        return {
            "videos": [self._video] if self._video else [],
            "categories": [{"id": number, "name": name} for name, number in self._names.items()],
            "instances": [{"id": n, "video_id": 1, "category_id": c} for n, c in self._tracks.items()],
        }


def sink(
    path: Path, encode: EncodeOptions, overlay: Overlay, rate: Fraction, audio: Sound | None = None
) -> Lines | Video:
    """Return what writes a stream to `path`, by its ending."""
    return Lines(path) if path.suffix.lower() in _LINES else Video(path, encode, overlay, rate, audio)
