"""Frames of video: prepared by OpenVINO as Pillow prepares them, in batches as alone; and distributions of distances."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from PIL import Image

import ovforge
from ovforge.errors import ModelError
from ovforge.model import DetectorSpec
from ovforge_detection.gfl import decode_gfl
from ovforge_detection.prepare import prepare
from ovforge_detection.scaling import Scaler

DATA = Path(os.environ.get("OVFORGE_TEST_DATA", "../shared/data"))


@pytest.mark.parametrize(("resize", "centred"), [("stretch", False), ("fit", True), ("fit", False)])
@pytest.mark.parametrize("size", [(61, 90), (300, 200), (64, 96), (9, 500)])
def test_frames_are_prepared_as_pictures_are(resize: Any, centred: bool, size: tuple[int, int]) -> None:
    spec = DetectorSpec(
        kind="described", height=64, width=96, resize=resize, resample="linear", centred=centred, colours="BGR",
        scale=1.0, mean=(103.5, 116.3, 123.7), std=(57.4, 57.1, 58.4), fill=(114.0,),
    )  # fmt: skip
    assert Scaler.serves(spec)
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours, theirs = Scaler(spec)(frame), prepare(Image.fromarray(frame), spec)
    assert (ours.scale, ours.shift, ours.content, ours.size) == (
        theirs.scale,
        theirs.shift,
        theirs.content,
        theirs.size,
    )
    apart = np.abs(ours.pixels - theirs.pixels) * 57
    assert apart.max() < 1.1  # a level of 255, by rounding
    assert (apart > 0.1).mean() < 0.01


def expected_boxes(scores: np.ndarray, sides: np.ndarray, stride: int, columns: int, threshold: float) -> list[Any]:
    """Decode cell by cell, as the paper has it."""
    found = []
    for cell, row in enumerate(scores):
        best = int(row.argmax())
        if row[best] < threshold:
            continue
        x, y = (cell % columns + 0.5) * stride, (cell // columns + 0.5) * stride
        lengths = []
        for side in range(4):
            raised = [math.exp(value) for value in sides[cell].reshape(4, -1)[side]]
            lengths.append(sum(n * value for n, value in enumerate(raised)) / sum(raised) * stride)
        found.append([x - lengths[0], y - lengths[1], x + lengths[2], y + lengths[3], row[best], best])
    return found


@pytest.mark.parametrize("together", [False, True])
def test_distributions_become_boxes(together: bool) -> None:
    rng = np.random.default_rng(0)
    spec = DetectorSpec(kind="described", height=64, width=96)
    outputs, expected = {}, []
    for stride in (8, 16, 32):
        rows, columns = math.ceil(64 / stride), math.ceil(96 / stride)
        scores = rng.random((rows * columns, 3)).astype(np.float32)
        sides = rng.normal(size=(rows * columns, 44)).astype(np.float32)
        parts = [np.concatenate([scores, sides], 1)] if together else [sides, scores]
        outputs |= {f"{stride}-{n}": part[None] for n, part in enumerate(parts)}
        expected += expected_boxes(scores, sides, stride, columns, 0.8)
    if together:
        outputs = {"all": np.concatenate(list(outputs.values()), 1)}
        shift = np.repeat([8, 16, 32], [96, 24, 6]) / 2  # cells of one table begin at their corners
    boxes, scores, classes = decode_gfl(outputs, 3, spec, 0.8, False)
    if together:
        best = outputs["all"][0, :, :3].max(1) >= 0.8
        boxes = boxes + shift[best][:, None]
    np.testing.assert_allclose(np.column_stack([boxes, scores, classes]), expected, atol=1e-3)
    with pytest.raises(ModelError, match="do not hold"):
        decode_gfl(outputs, 5 if together else 4, spec, 0.8, False)


def write_counter(folder: Path) -> dict[str, Any]:
    """Write a model with a box for each picture, whose score is the mean of its pixels."""
    pixels = ops.parameter([-1, 3, 8, 8], np.float32, name="image")
    pixels.output(0).set_names({"image"})
    mean = ops.reduce_mean(pixels, np.array([1, 2, 3]), False)
    score = ops.reshape(ops.divide(mean, np.float32(255)), np.array([-1, 1, 1]), False)
    zero = ops.multiply(score, np.float32(0))
    rows = ops.concat([zero, zero, ops.add(zero, np.float32(4)), ops.add(zero, np.float32(8)), score, zero], 2)
    rows.output(0).set_names({"rows"})
    ov.save_model(ov.Model([rows], [pixels], "mean"), folder / "mean.xml", compress_to_fp16=False)
    (folder / "mean.json").write_text(json.dumps({"output_postproc": [{"converter": "yolo_v10", "labels": ["thing"]}]}))
    return {"source": str(folder / "mean.xml"), "use": "model-proc", "proc": str(folder / "mean.json")}


@pytest.mark.parametrize("batch", [1, 3])
def test_frames_of_any_number_give_what_each_gives_alone(batch: int, tmp_path: Path) -> None:
    task = {"use": "detect", "batch": batch}
    pipe = ovforge.Pipeline.from_config(
        ovforge.PipelineConfig.of({"task": task, "load": write_counter(tmp_path)}), cache=None
    )
    detector = pipe.task.frames(threshold=0.0)  # type: ignore[attr-defined]
    frames = [np.full((10 + n % 2, 20, 3), 20 * n + 5, np.uint8) for n in range(5)]
    found = detector(frames)
    np.testing.assert_allclose(
        [float(each.scores[0]) for each in found], [(20 * n + 5) / 255 for n in range(5)], atol=1e-3
    )
    for frame, each in zip(frames, found, strict=True):
        np.testing.assert_array_equal(detector([frame])[0].boxes, each.boxes)
        np.testing.assert_allclose(each.boxes, [[0, 0, 10, len(frame)]], atol=1e-3)
    assert (detector.names, detector.threshold, detector.batch) == (["thing"], 0.5, batch)


@pytest.mark.skipif(not (DATA / "models/nanodet.xml").exists(), reason="the real detectors are not here")
def test_a_real_nanodet_sees_the_people_of_a_real_frame(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "nanodet.json").write_text(json.dumps({
        "input_preproc": [{"params": {
            "resize": "no-aspect-ratio", "color_space": "BGR", "scale": 1.0, "mean": [103.53, 116.28, 123.675],
            "std": [57.375, 57.12, 58.395],
        }}],
        "output_postproc": [{"converter": "nanodet", "labels": ["person", *(f"other {n}" for n in range(79))]}],
    }))  # fmt: skip
    load = {
        "source": str(DATA.resolve() / "models/nanodet.xml"),
        "use": "model-proc",
        "proc": str(tmp_path / "nanodet.json"),
    }
    pipe = ovforge.Pipeline.from_config(ovforge.PipelineConfig.of({"task": "detect", "load": load}), cache=None)
    with av.open(str(DATA / "video/PETS09-S2L1/vtest.avi")) as video:
        frame = next(video.decode(video=0)).to_ndarray(format="rgb24")
    (found,) = pipe.task.frames(text="person", threshold=0.35)([frame])  # type: ignore[attr-defined]
    truth = np.loadtxt(DATA / "video/PETS09-S2L1/gt.txt", delimiter=",")
    truth = truth[(truth[:, 0] == 1) & (truth[:, 6] > 0)][:, 2:6]
    truth[:, 2:] += truth[:, :2]
    for box in truth:
        low, high = np.maximum(found.boxes[:, :2], box[:2]), np.minimum(found.boxes[:, 2:], box[2:])
        both = np.clip(high - low, 0, None).prod(1)
        areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - both
        assert (both / areas).max() > 0.5
