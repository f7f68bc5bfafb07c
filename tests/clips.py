"""Short clips of a bright square on its way, and a detector that finds it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import openvino as ov
from openvino import opset13 as ops

WIDTH, HEIGHT, SIDE, RATE = 96, 64, 16, 10


def corner(number: int, shift: int = 0) -> tuple[int, int]:
    """Return left and top of the square in a picture."""
    return 4 + 2 * number, 8 + shift + number // 2


def picture(number: int, shift: int = 0) -> np.ndarray:
    array = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
    left, top = corner(number, shift)
    array[top : top + SIDE, left : left + SIDE] = 235
    return array


def write_clip(path: Path, count: int = 24, shift: int = 0, codec: str = "mpeg4", **stream: Any) -> Path:
    """Write a clip of `count` frames."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=RATE)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, stream.get("pix_fmt", "yuv420p")
        video.bit_rate = 4_000_000
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, shift), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def write_detector(folder: Path) -> tuple[Path, Path]:
    """Write a model whose one box holds all bright pixels of its input, and its model-proc."""
    side = 64
    pixels = ops.parameter([1, 3, side, side], np.float32, name="image")
    pixels.output(0).set_names({"image"})
    bright = ops.greater(ops.reduce_max(pixels, np.array([1]), False), np.float32(128))

    def span(axis: int) -> tuple[Any, Any]:
        lit = ops.reduce_logical_or(bright, np.array([axis]), False)
        places = ops.constant(np.arange(side, dtype=np.float32)[None])
        low = ops.reduce_min(ops.select(lit, places, np.float32(side)), np.array([1]), True)
        high = ops.reduce_max(ops.select(lit, ops.add(places, np.float32(1)), np.float32(0)), np.array([1]), True)
        return low, high

    (left, right), (top, bottom) = span(1), span(2)
    score = ops.convert(ops.reduce_logical_or(bright, np.array([1, 2]), False), "f32")
    score = ops.multiply(ops.reshape(score, np.array([1, 1]), False), np.float32(0.9))
    kind = ops.multiply(score, np.float32(0))
    rows = ops.unsqueeze(ops.concat([left, top, right, bottom, score, kind], 1), np.array(0))
    rows.output(0).set_names({"rows"})
    path, proc = folder / "square.xml", folder / "square.json"
    ov.save_model(ov.Model([rows], [pixels], "square"), path, compress_to_fp16=False)
    described = {
        "input_preproc": [{"params": {"resize": "no-aspect-ratio"}}],
        "output_postproc": [{"converter": "yolo_v10", "labels": ["square"], "confidence_threshold": 0.5}],
    }
    proc.write_text(json.dumps(described))
    return path, proc
