"""Described models: pictures and boxes as DL Streamer computes them, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from PIL import Image
from typer.testing import CliRunner

import ovforge
import ovforge_detection
from ovforge import testing
from ovforge.cli import app
from ovforge.errors import ConfigError, ModelError
from ovforge_detection.description import Picture, read_description, spec_of
from ovforge_detection.outputs import decode_described
from ovforge_detection.prepare import Prepared, prepare

BOXES = np.array([[20, 30, 80, 90], [100, 10, 120, 60]], np.float32)
CLASSES = [1, 2]
HEIGHT, WIDTH = 96, 128
LABELS = ["background", "cat", "dog"]


def write_model(
    folder: Path, outputs: dict[str, Any] | np.ndarray, post: Any, pre: Any = (), inputs: dict[str, Any] | None = None
) -> Path:
    """Write a model of one or more inputs that always gives `outputs`, and its model-proc.

    An output may be a function of the inputs. `post` and `pre` are entries of output_postproc and input_preproc.
    """
    shapes = inputs or {"data": [1, 3, HEIGHT, WIDTH]}
    params = {name: ops.parameter(ov.PartialShape(shape), np.float32, name=name) for name, shape in shapes.items()}
    for name, param in params.items():
        param.output(0).get_tensor().set_names({name})
    nothing = ops.multiply(
        ops.concat([ops.reshape(ops.reduce_mean(p, ops.constant(list(range(len(shapes[n])))), False), [1], False)
                    for n, p in params.items()], 0), np.float32(0),
    )  # fmt: skip
    nothing = ops.reduce_mean(nothing, np.array([0]), False)
    results = []
    for name, value in (outputs if isinstance(outputs, dict) else {"out": outputs}).items():
        if callable(value):
            made = value(params)
        elif np.issubdtype(value.dtype, np.integer):
            made = ops.constant(value)
        else:
            made = ops.add(ops.constant(value.astype(np.float32)), nothing)
        made.output(0).get_tensor().set_names({name})
        results.append(ops.result(made))
    folder.mkdir(exist_ok=True)
    ov.save_model(ov.Model(results, list(params.values()), "answers"), folder / "model.xml", compress_to_fp16=False)
    entries = post if isinstance(post, list) else [{"labels": LABELS, **post}]
    proc = {"json_schema_version": "2.2.0", "input_preproc": list(pre), "output_postproc": entries}
    (folder / "model-proc.json").write_text(json.dumps(proc))
    return folder


def load(folder: Path, **options: Any) -> Any:
    config = {
        "task": "detect", "load": {"source": str(folder), "use": "model-proc", **options},
        "device": {"use": "cpu", "precision": "f32"},
    }  # fmt: skip
    return ovforge.load(config, cache=None)


def found(folder: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **call: Any) -> Any:
    return load(folder)(Image.new("RGB", size), **call).detections[0]


def ssd(boxes: np.ndarray = BOXES) -> tuple[np.ndarray, dict[str, Any]]:
    rows = [[0, c, 0.9, *(box / [WIDTH, HEIGHT] * 2)] for c, box in zip(CLASSES, boxes.reshape(-1, 2, 2), strict=True)]
    rows = [
        [*row[:3], *np.ravel(box / [WIDTH, HEIGHT])] for row, box in zip(rows, boxes.reshape(-1, 2, 2), strict=True)
    ]
    rows += [[0, 1, 0.1, 0, 0, 1, 1], [-1, 0, 0, 0, 0, 0, 0], [0, 1, 0.99, 0, 0, 1, 1]]
    return np.array([[rows]]), {"converter": "detection_output"}


# -- outputs ----------------------------------------------------------------------------------------------------------


def rows_of(count: int) -> np.ndarray:
    rows = np.zeros((1, 50, count))
    centres = np.concatenate([(BOXES[:, :2] + BOXES[:, 2:]) / 2, BOXES[:, 2:] - BOXES[:, :2]], 1)
    rows[0, 7:9, :4] = centres
    return rows


def yolo_v8() -> tuple[Any, dict[str, Any]]:
    output = rows_of(7)
    output[0, [7, 8], [4 + c for c in CLASSES]] = 0.9
    output[0, 9, :4], output[0, 9, 5] = output[0, 7, :4] + 2, 0.8  # the same cat again
    return output.transpose(0, 2, 1), {"converter": "yolo_v8", "iou_threshold": 0.5}


def yolo_v7() -> tuple[Any, dict[str, Any]]:
    output = rows_of(8)
    output[0, 7:9, 4] = output[0, [7, 8], [5 + c for c in CLASSES]] = 0.95
    return output, {"converter": "yolo_v7"}


def yolo_v10() -> tuple[Any, dict[str, Any]]:
    rows = [[*box, 0.9, c] for box, c in zip(BOXES, CLASSES, strict=True)]
    return np.array([[*rows, [0, 0, 1, 1, 0.1, 0]]]), {"converter": "yolo_v10"}


def yolo_x() -> tuple[Any, dict[str, Any]]:
    strides = [(x, y, s) for s in (8, 16, 32) for y in range(HEIGHT // s) for x in range(WIDTH // s)]
    output = np.full((1, len(strides), 8), -5.0)
    output[..., 4:] = 0
    for place, box, c in ((40, BOXES[0], 1), (230, BOXES[1], 2)):
        x, y, stride = strides[place]
        output[0, place, :4] = [
            (box[0] + box[2]) / 2 / stride - x, (box[1] + box[3]) / 2 / stride - y,
            np.log((box[2] - box[0]) / stride), np.log((box[3] - box[1]) / stride),
        ]  # fmt: skip
        output[0, place, [4, 5 + c]] = 0.95
    return output, {"converter": "yolo_x", "classes": 3}


def queries(converter: str) -> tuple[Any, dict[str, Any]]:
    low, high = BOXES[:, :2] / [WIDTH, HEIGHT], BOXES[:, 2:] / [WIDTH, HEIGHT]
    boxes = np.zeros((1, 6, 4))
    boxes[0, 2:4] = np.concatenate([(low + high) / 2, high - low], 1)
    logits = np.full((1, 6, 3), -9.0)
    logits[..., 0] = 0 if converter == "rtdetr" else -9
    logits[0, [2, 3], CLASSES] = 9
    logits[0, 2:4, 0] = -9
    described = {"converter": converter, "confidence_threshold": 0.6}
    if converter == "rtdetr":
        logits[0, [0, 1, 4, 5]] = 0
    return {"boxes": boxes, "logits": logits}, described


def together(converter: str) -> tuple[Any, dict[str, Any]]:
    scored = np.concatenate([BOXES, [[0.9], [0.8]]], 1)
    if converter == "boxes_scores":
        relative = BOXES / np.array([WIDTH, HEIGHT] * 2)
        relative[:, 2:] -= relative[:, :2]
        scores = np.zeros((2, 1, 3))
        scores[[0, 1], 0, CLASSES] = 0.9
        return {"boxes": relative, "scores": scores}, {"converter": converter}
    labels = np.array(CLASSES, np.int64)
    if converter == "mask_rcnn":
        return {"boxes": scored, "labels": labels - 1, "masks": np.zeros((2, 28, 28))}, {"converter": converter}
    if converter == "detection":
        scores = np.array([0.9, 0.8])
        return {"boxes": BOXES.astype(float), "labels": labels, "scores": scores}, {"converter": converter}
    return {"boxes": scored, "labels": labels}, {"converter": converter}


def mask_rows() -> tuple[Any, dict[str, Any]]:
    return {"reshape_do_2d": ssd()[0][0, 0, :2], "SecondStageBoxPredictor_1/Conv_3/BiasAdd": np.zeros((2, 90, 3, 3))}, {
        "converter": "mask_rcnn"
    }


def more(kind: str, converter: str) -> tuple[Any, dict[str, Any]]:
    """Return outputs that hold more than boxes: a turned box's angle, a weight for each mask, and masks."""
    masks = np.ones((1, 5, HEIGHT // 4, WIDTH // 4))
    if converter == "rfdetr_seg":
        outputs, _ = queries("rfdetr")
        return {**outputs, "masks": np.zeros((1, 6, HEIGHT // 4, WIDTH // 4))}, {"converter": converter}
    if kind == "rows":
        rows = yolo_v10()[0]
        if converter.endswith("obb"):
            rows[..., :4] = np.concatenate([(rows[..., :2] + rows[..., 2:4]) / 2, rows[..., 2:4] - rows[..., :2]], -1)
            return np.pad(rows, ((0, 0), (0, 0), (0, 1)), constant_values=1.5), {"converter": converter}
        return {"boxes": np.pad(rows, ((0, 0), (0, 0), (0, 5)), constant_values=3), "masks": masks}, {
            "converter": converter
        }
    count = 5 if converter.lower().endswith("seg") else 1
    boxes = np.pad(yolo_v8()[0], ((0, 0), (0, count), (0, 0)), constant_values=7.0)
    return {"boxes": boxes, **({"masks": masks} if count == 5 else {})}, {"converter": converter}


DESCRIBED = {
    **{n: (lambda n=n: more("columns", n)) for n in ("yolo_v8_obb", "YOLOv8-OBB", "yolo_v11_seg", "YOLOv8-SEG")},
    **{n: (lambda n=n: more("rows", n)) for n in ("yolo_v26_obb", "yolo_v26_pose", "yolo_v26_seg", "rfdetr_seg")},
    "ssd": ssd, "yolo-v7": yolo_v7, "yolo-v8": yolo_v8, "yolo-v10": yolo_v10, "yolo-x": yolo_x,
    "yolo-v5-rows": lambda: (yolo_v7()[0], {"converter": "yolo_v5"}), "rtdetr": lambda: queries("rtdetr"),
    "rfdetr": lambda: queries("rfdetr"), "mask-rcnn-rows": mask_rows,
    "empty": lambda: (together("boxes_labels")[0], {}), "empty-ssd": lambda: (ssd()[0], {}),
    **{n: (lambda n=n: together(n)) for n in ("boxes_labels", "boxes_scores", "mask_rcnn", "detection")},
}  # fmt: skip


@pytest.mark.parametrize("kind", DESCRIBED)
def test_outputs_are_read_by_their_description(kind: str, tmp_path: Path) -> None:
    output, description = DESCRIBED[kind]()
    detections = found(write_model(tmp_path / "m", output, description), (2 * WIDTH, HEIGHT))
    order = np.argsort(detections.classes)
    assert [detections.labels[n] for n in order] == ["cat", "dog"]
    np.testing.assert_allclose(detections.boxes[order], BOXES * [2, 1, 2, 1], atol=0.05)


def test_poses_are_boxes_of_one_class(tmp_path: Path) -> None:
    output = rows_of(5 + 17 * 3).transpose(0, 2, 1)
    output[0, 4, 7:9], output[0, 5:] = [0.9, 0.6], 200
    pipe = load(write_model(tmp_path / "m", output, {"converter": "yolo_v11_pose", "labels": ["person"]}))
    result = pipe(Image.new("RGB", (WIDTH, HEIGHT)))
    assert list(result.detections[0].labels) == ["person", "person"]
    np.testing.assert_allclose(result.detections[0].boxes, BOXES, atol=0.05)
    np.testing.assert_allclose(result.detections[0].scores, [0.9, 0.6], rtol=1e-6)
    assert "boxes are read, and the points of the model are not" in " ".join(result.warnings)


def test_faces_by_their_centres(tmp_path: Path) -> None:
    """Against what the source of the converter `centerface` computes, place by place."""
    rng = np.random.default_rng(3)
    rows, columns = HEIGHT // 4, WIDTH // 4
    heatmap, scale = np.zeros((1, 1, rows, columns)), rng.uniform(0, 2, (1, 2, rows, columns))
    offset = rng.uniform(-0.5, 0.5, (1, 2, rows, columns))
    places = [(0, 0, 0.9), (12, 20, 0.8), (23, 31, 0.7), (12, 5, 0.51), (5, 5, 0.49)]
    for row, column, score in places:
        heatmap[0, 0, row, column] = score
    expected = []
    for row, column, score in places[:4]:
        high, wide = np.exp(scale[0, :, row, column]) * 4
        x = min(max(0, (column + offset[0, 1, row, column] + 0.5) * 4 - wide / 2), WIDTH)
        y = min(max(0, (row + offset[0, 0, row, column] + 0.5) * 4 - high / 2), HEIGHT)
        expected.append([x, y, min(x + wide, WIDTH), min(y + high, HEIGHT), score])
    outputs = {"heatmap": heatmap, "scale": scale, "offset": offset, "landmarks": np.zeros((1, 10, rows, columns))}
    detections = found(write_model(tmp_path / "m", outputs, {"converter": "centerface", "labels": ["face"]}))
    assert set(detections.labels) == {"face"}
    given = np.column_stack([detections.boxes, detections.scores])
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-4)


def test_text_by_its_outline(tmp_path: Path) -> None:
    """Boxes around rectangles of a map, the score their mean; small ones and what scores low are left out."""
    pytest.importorskip("cv2")
    heatmap = np.zeros((1, 1, HEIGHT, WIDTH))
    heatmap[0, 0, 10:30, 20:90], heatmap[0, 0, 12:20, 30:60] = 0.8, 0.6
    heatmap[0, 0, 50:60, 5:40] = 0.4  # scores below the threshold
    heatmap[0, 0, 70:73, 5:40] = 0.9  # a side of 3
    post = {"converter": "heatmap_boxes", "labels": ["text"], "confidence_threshold": 0.5}
    detections = found(write_model(tmp_path / "m", heatmap, post))
    np.testing.assert_allclose(detections.boxes, [[20, 10, 90, 30]])
    np.testing.assert_allclose(detections.scores, [heatmap[0, 0, 10:30, 20:90].mean()], rtol=1e-5)
    both = {**post, "confidence_threshold": 0.3, "minimum_side": 2, "binarize_threshold": 0.2}
    assert len(found(write_model(tmp_path / "m", heatmap, both)).boxes) == 3


def test_without_an_entry_outputs_are_read_by_their_shapes(tmp_path: Path) -> None:
    boxes = np.array([[*BOXES[0], 0.7], [0, 0, 1, 1, 0.2]])
    detections = found(write_model(tmp_path / "m", {"boxes": boxes}, []))
    assert detections.labels == ["class 0"]
    np.testing.assert_allclose(detections.scores, [0.7], rtol=1e-6)
    with pytest.raises(ModelError, match="does not say how outputs are read"):
        load(write_model(tmp_path / "m", np.zeros((1, 4)), []))


def spec_for(post: dict[str, Any], pre: dict[str, Any] | None = None, channels: int = 3) -> Any:
    entries = {"input_preproc": [{"params": pre or {}}], "output_postproc": [{"converter": "boxes", **post}]}
    proc = read_description(entries, "proc")
    return spec_of(proc, Picture("data", "NCHW", channels, HEIGHT, WIDTH), (), {}, lambda path: [path])


PLAIN = Prepared(np.zeros((3, HEIGHT, WIDTH), np.float32), np.ones(()), (HEIGHT, WIDTH), (HEIGHT, WIDTH), (1, 1))
ANCHORS = [1.5, 2, 3, 1, 2, 2, 30, 40, 50, 20, 40, 40]


def reference(grids: list[np.ndarray], kind: str, *, sigmoid: bool, softmax: bool, threshold: float) -> list[Any]:
    """Return what DL Streamer computes, one box after the other; without suppression."""
    logistic = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    act = logistic if sigmoid else float
    boxes = []
    for place, grid in enumerate(sorted(grids, key=np.size)):
        _, height, width = grid.shape
        cells = grid.reshape(3, -1, height, width)
        for anchor, _, row, column in np.ndindex(3, 1, height, width):
            values = cells[anchor, :, row, column].astype(float)
            confidence, classes = act(values[4]), values[5:]
            if softmax:
                classes = np.exp(classes) / np.exp(classes).sum()
            score = confidence * max(0, classes.max())
            if confidence < threshold or score < threshold:
                continue
            across, down = np.array(ANCHORS).reshape(-1, 2)[(place * 3 + anchor) if kind != "yolo_v2" else anchor]
            x, y = act(values[0]), act(values[1])
            if kind == "yolo_v5":
                x, y = 2 * x - 0.5, 2 * y - 0.5
                w, h = (2 * logistic(values[2])) ** 2 * across, (2 * logistic(values[3])) ** 2 * down
            else:
                w, h = math.exp(values[2]) * across, math.exp(values[3]) * down
            if kind == "yolo_v2":
                w, h = w / width * WIDTH, h / height * HEIGHT
            x, y = (x + column) / width * WIDTH, (y + row) / height * HEIGHT
            low, extent = np.array([x - w / 2, y - h / 2]), np.array([w, h])
            sides = np.array([WIDTH, HEIGHT])
            if (low - extent / 2 > sides).any() or (low + extent / 2 < 0).any():
                continue  # isDetectionValid, which takes a corner for the middle
            boxes.append((score, int(classes.argmax()), *np.clip(low, 0, sides), *np.clip(low + extent, 0, sides)))
    return sorted(boxes)


@settings(max_examples=25)
@given(
    st.integers(0, 2**31), st.sampled_from(["yolo_v2", "yolo_v3", "yolo_v4", "yolo_v5"]), st.booleans(), st.booleans(),
    st.sampled_from(["NCHW", "NHWC", "flat"]), st.booleans(),
)  # fmt: skip
def test_grids_are_read_as_dl_streamer_reads_them(
    seed: int, kind: str, sigmoid: bool, softmax: bool, layout: str, dictionary: bool
) -> None:
    rng = np.random.default_rng(seed)
    grids = [
        rng.normal(0, 1, (3 * 9, 3 * n, 4 * n)).astype(np.float32) for n in ((1,) if kind == "yolo_v2" else (2, 1))
    ]
    for grid in grids:
        cells = grid.reshape(3, 9, *grid.shape[1:])
        if not sigmoid:
            cells[:, [0, 1, 4]] = rng.uniform(0, 1, cells[:, [0, 1, 4]].shape)
        if not softmax:
            cells[:, 5:] = rng.uniform(0, 1, cells[:, 5:].shape)
    masks: Any = {"4": [0, 1, 2], "8": [3, 4, 5]} if dictionary else [0, 1, 2, 3, 4, 5]
    spec = spec_for({
        "converter": kind, "anchors": ANCHORS[:6] if kind == "yolo_v2" else ANCHORS, "classes": 4,
        "output_sigmoid_activation": sigmoid, "do_cls_softmax": softmax, "confidence_threshold": 0.3,
        **({} if kind == "yolo_v2" else {"masks": masks}),
    })  # fmt: skip
    laid = {
        "NCHW": lambda grid: grid[None], "NHWC": lambda grid: grid.transpose(1, 2, 0)[None],
        "flat": lambda grid: grid.reshape(1, -1) if grid.shape[1] == 3 else grid[None],
    }[layout]  # fmt: skip
    outputs = {str(n): laid(grid) for n, grid in enumerate(grids)}
    ours = decode_described(outputs, spec, PLAIN, None, suppressed=False)
    rows = sorted(zip(ours.scores.tolist(), ours.classes.tolist(), ours.boxes.tolist(), strict=True))
    theirs = reference(grids, kind.replace("v4", "v3"), sigmoid=sigmoid, softmax=softmax, threshold=0.3)
    assert len(rows) == len(theirs)
    for one, other in zip(rows, theirs, strict=True):
        np.testing.assert_allclose([one[0], one[1], *one[2]], other, rtol=1e-3, atol=1e-3)


def test_of_overlapping_boxes_one_is_left_whatever_their_labels(tmp_path: Path) -> None:
    output, description = yolo_v8()
    output[0, :, 9] = 0
    output[0, :4, 9], output[0, 6, 9] = output[0, :4, 7] + 2, 0.85  # a dog at the place of the cat
    folder = write_model(tmp_path / "m", output, description)
    assert found(folder).labels == ["cat", "dog"]
    assert found(folder, nms=0.5).labels == ["cat", "dog", "dog"]  # asked for, it is that of a label
    assert found(folder, nms=1).labels == ["cat", "dog", "dog"]


def test_other_thresholds_need_no_inference(tmp_path: Path) -> None:
    pipe, image = load(write_model(tmp_path / "m", *yolo_v8())), Image.new("RGB", (WIDTH, HEIGHT))
    first = pipe(image)
    assert set(first.adjustable) == {"threshold", "limit"}, "how boxes give way, the description says"
    assert set(pipe(image, nms=0.5).adjustable) == {"threshold", "nms", "limit"}
    for values in ({"threshold": 0.85}, {"limit": 1}, {"threshold": 0.01}):
        assert first.adjusted(**values).as_json() == pipe(image, **values).as_json()


def test_entries_have_labels_and_thresholds_of_their_own(tmp_path: Path) -> None:
    one, two = ssd()[0], ssd(BOXES + 3)[0]
    two[..., 2] *= 0.5
    folder = write_model(tmp_path / "m", {"one": one, "two": two}, [
        {"layer_name": "one", "converter": "detection_output", "labels": LABELS},
        {"layer_names": ["two"], "converter": "detection_output", "labels": ["", "Red House", "Dr. Pepper can"],
         "confidence_threshold": 0.4},
    ])  # fmt: skip
    assert sorted(found(folder).labels) == ["Dr. Pepper can", "Red House", "cat", "dog"]
    wanted = found(folder, text=["Dr. Pepper can", "CAT"])
    assert sorted(wanted.labels) == ["Dr. Pepper can", "cat"]


# -- pictures ---------------------------------------------------------------------------------------------------------

RESIZE = ["no-aspect-ratio", "aspect-ratio", "aspect-ratio-pad"]
CROP = [None, "central", "top_left", "top_right", "bottom_left", "bottom_right"]


def converted(image: np.ndarray, params: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """Return what DL Streamer's OpenCV_VPP::CustomImageConvert makes of an RGB picture, and how boxes go back."""
    cv2 = pytest.importorskip("cv2")
    resize, crop = params.get("resize", "no-aspect-ratio"), params.get("crop")
    crop = None if resize == "no-aspect-ratio" else crop
    pad_x, pad_y = params["padding"]["stride_x"], params["padding"]["stride_y"]
    inner = (WIDTH - 2 * pad_x, HEIGHT - 2 * pad_y)
    height, width = image.shape[:2]
    scale_x = scale_y = 1.0
    if (width, height) != inner:
        scale_x, scale_y = inner[0] / width, inner[1] / height
        if resize != "no-aspect-ratio":
            scale_x = scale_y = min(scale_x, scale_y)
        if crop:
            scale_x, scale_y = scale_x * 1.125, scale_y * 1.125
        # A stretched picture fills the input here; DL Streamer cuts sides of 127.99 to 127, and fills up a column.
        exact = resize == "no-aspect-ratio"
        image = cv2.resize(image, inner if exact else (int(width * scale_x), int(height * scale_y)))
    left = top = 0
    if crop:
        over_x, over_y = max(0, image.shape[1] - inner[0]), max(0, image.shape[0] - inner[1])
        left = {"central": over_x // 2}.get(crop, over_x if crop.endswith("right") else 0)
        top = {"central": over_y // 2}.get(crop, over_y if crop.startswith("bottom") else 0)
        image = image[top : image.shape[0] - over_y + top, left : image.shape[1] - over_x + left]
    if params["color_space"] == "BGR":
        image = image[..., ::-1]
    shift_x, shift_y = (WIDTH - image.shape[1]) // 2, (HEIGHT - image.shape[0]) // 2
    if resize == "aspect-ratio-pad":
        shift_x = shift_y = 0
    result = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    result[:] = params["padding"]["fill_value"]
    result[shift_y : shift_y + image.shape[0], shift_x : shift_x + image.shape[1]] = image

    def restored(x: float, y: float) -> tuple[float, float]:
        return (x - shift_x + left) / scale_x, (y - shift_y + top) / scale_y

    return result, restored


@settings(max_examples=40)
@given(
    st.integers(20, 200), st.integers(20, 200), st.sampled_from(RESIZE), st.sampled_from(CROP), st.integers(0, 12),
    st.integers(0, 12), st.sampled_from(["RGB", "BGR"]),
)  # fmt: skip
def test_pictures_are_prepared_as_dl_streamer_does(
    height: int, width: int, resize: str, crop: str | None, pad_x: int, pad_y: int, space: str
) -> None:
    rng = np.random.default_rng(height * width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    params: dict[str, Any] = {
        "resize": resize, "color_space": space,
        "padding": {"stride_x": pad_x, "stride_y": pad_y, "fill_value": [10.0, 20.0, 30.0]},
    }  # fmt: skip
    if crop:
        params["crop"] = crop
    expected, restored = converted(image, params)
    prepared = prepare(Image.fromarray(image), spec_for({}, params))
    np.testing.assert_allclose(prepared.pixels.transpose(1, 2, 0), expected, atol=1.01)
    (left, top), (right, bottom) = restored(30, 20), restored(90, 70)
    limits = [width, height] * 2
    ours = prepared.restored(np.array([[30, 20, 90, 70]], np.float32))
    np.testing.assert_allclose(ours[0], np.clip([left, top, right, bottom], 0, limits), atol=1e-3)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, lambda v: v),
        ({"range": [0.0, 1.0]}, lambda v: v / 255),
        ({"range": [-1.0, 1.0]}, lambda v: v * 2 / 255 - 1),
        ({"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.1, 0.3]}, lambda v: (v / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.1, 0.3]),
        ({"range": [0, 255], "mean": [9, 8, 7], "std": [2, 3, 4]}, lambda v: (v - [9, 8, 7]) / [2, 3, 4]),
        # The lower end of the range is added at last: affine_add in inference_impl.cpp.
        ({"range": [1.0, 2.0], "mean": [0.5], "std": [0.2]}, lambda v: v / 255 / 0.2 + 1 - 0.5 / 0.2),
        ({"scale": 127.5}, lambda v: v / 127.5),
    ],
)
def test_pixels_are_normalized_as_dl_streamer_does(params: dict[str, Any], expected: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels = prepare(Image.fromarray(image), spec_for({}, {"color_space": "RGB", **params})).pixels
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), expected(image.astype(float)), atol=1e-4)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 400), (520, 3000), (700, 10), (518, 518), (77, 91)])
def test_sizes_by_multiples(size: tuple[int, int]) -> None:
    """As `CalculateAspectRatioMultipleOfResize` of DL Streamer computes them: by the scale that is nearer to 1."""
    across, down = 518 / size[0], 448 / size[1]
    scale = across if abs(1 - across) < abs(1 - down) else down
    width, height = (max(1, math.floor(scale * side / 14 + 0.5)) * 14 for side in size)
    pre = {"resize": "aspect-ratio-multiple-of", "reshape_size": [448, 518], "resize-multiple": 14}
    assert prepare(Image.new("RGB", size), spec_for({}, pre)).canvas == (height, width)


def test_a_model_takes_each_picture_at_its_own_size(tmp_path: Path) -> None:
    """Also one that was made for a size; boxes come back into the picture."""
    pre = {"params": {"resize": "aspect-ratio-multiple-of", "reshape_size": [64, 64], "resize-multiple": 32}}
    info = {"layer_name": "info", "format": "image_info"}
    inputs = {"info": [1, 3], "image": [1, 3, HEIGHT, WIDTH]}
    output = {"out": gather("info", 1, 1000)}
    pipe = load(write_model(tmp_path / "m", output, {"converter": "detection_output"}, [info, pre], inputs))
    for size, width in (((200, 100), 0.128), ((70, 70), 0.064)):
        found = pipe(Image.new("RGB", size), threshold=0.0).detections[0]
        np.testing.assert_allclose(found.scores, [width], rtol=1e-5)
        np.testing.assert_allclose(found.boxes, [np.array([0.1, 0.1, 0.5, 0.5]) * [*size, *size]], rtol=1e-4)
    with pytest.raises(ConfigError, match="what each picture gives"):
        ovforge.Pipeline(
            ovforge.Use("detect", size=(64, 64)), source=tmp_path / "m", load={"use": "model-proc"}, cache=None
        )
    for wrong in ({"reshape_size": None}, {"padding": {"stride": 2}}, {"resize-multiple": 0}):
        with pytest.raises(ModelError):
            load(write_model(tmp_path / "w", *ssd(), [{"params": {**pre["params"], **wrong}}]))


@pytest.mark.parametrize(("channels", "layout"), [(1, "NCHW"), (1, "NHWC"), (4, "NCHW"), (4, "NHWC"), (3, "NHWC")])
def test_grey_and_four_channels(channels: int, layout: str, tmp_path: Path) -> None:
    sides = [HEIGHT, WIDTH]
    shape = [1, channels, *sides] if layout == "NCHW" else [1, *sides, channels]

    def score(params: dict[str, Any]) -> Any:
        mean = ops.reduce_mean(params["data"], np.array([2, 3] if layout == "NCHW" else [1, 2]), False)
        weighted = ops.multiply(mean, np.array([[1, 2, 4, 8][:channels]], np.float32) / np.float32(255 * 15))
        total = ops.reshape(ops.reduce_sum(weighted, np.array([1]), False), np.array([1, 1, 1, 1]), False)
        row = np.array([[[[0, 1, 0, 0.1, 0.1, 0.5, 0.5]]]], np.float32)
        return ops.add(ops.multiply(total, np.array([[[[0, 0, 1, 0, 0, 0, 0]]]], np.float32)), ops.constant(row))

    folder = write_model(tmp_path / "m", {"out": score}, {"converter": "detection_output"}, inputs={"data": shape})
    picture = Image.new("RGBA", (50, 40), (51, 102, 204, 128))
    detections = load(folder)(picture, threshold=0.0).detections[0]
    shown = np.asarray(Image.alpha_composite(Image.new("RGBA", (1, 1), "white"), picture.crop((0, 0, 1, 1))))[0, 0, :3]
    grey = float(np.asarray(Image.fromarray(shown[None, None]).convert("L"))[0, 0])
    values = {1: [grey], 3: shown[::-1].astype(float), 4: [204, 102, 51, 128]}[channels]
    expected = np.dot(values, [1, 2, 4, 8][:channels]) / (255 * 15)
    np.testing.assert_allclose(detections.scores, [expected], atol=1e-3)


# -- inputs -----------------------------------------------------------------------------------------------------------


def gather(name: str, place: int, scale: float) -> Any:
    """Return an output whose score is a value of an input beside the picture."""

    def make(params: dict[str, Any]) -> Any:
        flat = ops.reshape(params[name], np.array([-1]), False)
        value = ops.gather(flat, np.array([place]), np.array(0))
        pattern = np.array([[[[0, 0, 1 / scale, 0, 0, 0, 0]]]], np.float32)
        row = np.array([[[[0, 1, 0, 0.1, 0.1, 0.5, 0.5]]]], np.float32)
        return ops.add(ops.multiply(ops.reshape(value, np.array([1, 1, 1, 1]), False), pattern), ops.constant(row))

    return make


@pytest.mark.parametrize(
    ("name", "entry", "place", "scale", "expected"),
    [
        ("info", {"layer_name": "info", "format": "image_info"}, 0, 1000, HEIGHT / 1000),
        ("info", {"layer_name": "info", "format": "image_info", "params": {"scale": 0.25}}, 2, 1, 0.25),
        ("image_info", None, 1, 1000, WIDTH / 1000),
        ("seq", {"layer_name": "seq", "format": "sequence_index"}, 1, 2, 0.5),
        ("im_shape", None, 0, 1000, 0.064),  # a picture of 256x128 comes to 128x64
        ("im_shape", None, 1, 1000, 0.128),
        ("scale_factor", None, 0, 1, 0.5),
    ],
)
def test_inputs_beside_the_picture_are_filled(
    name: str, entry: dict[str, Any] | None, place: int, scale: float, expected: float, tmp_path: Path
) -> None:
    count = 2 if name in ("im_shape", "scale_factor", "seq") else 3
    inputs = {name: [1, -1] if name == "im_shape" else [1, count], "image": [1, 3, HEIGHT, WIDTH]}
    pre = [*([entry] if entry else []), {"layer_name": "image", "params": {"resize": "aspect-ratio"}}]
    output = {"out": gather(name, place, scale)}
    folder = write_model(tmp_path / "m", output, {"converter": "detection_output"}, pre, inputs)
    np.testing.assert_allclose(found(folder, (256, 128), threshold=0.0).scores, [expected], rtol=1e-5)


def test_an_input_that_nothing_fills_is_refused(tmp_path: Path) -> None:
    inputs = {"other": [1, 3], "image": [1, 3, HEIGHT, WIDTH]}
    folder = write_model(tmp_path / "m", *ssd(), inputs=inputs)
    with pytest.raises(ModelError, match="nothing fills its input 'other'"):
        load(folder)
    folder = write_model(tmp_path / "m", *ssd(), [{"layer_name": "info", "format": "image_info"}])
    result = load(folder)(Image.new("RGB", (9, 9)))
    assert result.warnings == ["the model has no input 'info', which input_preproc describes"]


def test_paddle_detectors_give_boxes_of_the_picture(tmp_path: Path) -> None:
    rows = np.array([[1, 0.9, 10, 20, 100, 120], [-1, 0, 0, 0, 0, 0]])
    inputs = {"im_shape": [1, 2], "image": [1, 3, HEIGHT, WIDTH], "scale_factor": [1, 2]}
    folder = write_model(tmp_path / "m", rows, {"converter": "paddle_detection"}, inputs=inputs)
    np.testing.assert_allclose(found(folder, (256, 200)).boxes, [[10, 20, 100, 120]], rtol=1e-5)


@pytest.mark.parametrize("number", [2**31, -7])
def test_a_class_that_no_model_has_is_refused(number: int, tmp_path: Path) -> None:
    output, description = ssd()
    output[..., 1] = number
    with pytest.raises(ModelError, match=f"of the class {number}, and classes are 0 to 99999"):
        found(write_model(tmp_path / "m", output, description))


def test_labels_are_no_link_that_leads_away(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", ssd()[0], {**ssd()[1], "labels": None, "labels_file": "labels.txt"})
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "labels.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ModelError, match="labels.txt is missing"):
        load(folder, proc=folder / "model-proc.json")


# -- what a model says of itself --------------------------------------------------------------------------------------


def test_model_info_of_an_ir(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", *yolo_v8())
    (folder / "model-proc.json").unlink()
    model = ov.Core().read_model(folder / "model.xml")
    for key, value in {
        "model_type": "YOLO", "labels": "background cat dog", "resize_type": "fit_to_window_letterbox", "pad_value": 114,
        "reverse_input_channels": "YES", "scale_values": 255, "iou_threshold": 0.7, "confidence_threshold": 0.25,
    }.items():  # fmt: skip
        model.set_rt_info(value, ["model_info", key])
    ov.save_model(model, tmp_path / "info.xml", compress_to_fp16=False)
    pipe = load(tmp_path / "info.xml")
    detections = pipe(Image.new("RGB", (2 * WIDTH, HEIGHT))).detections[0]
    assert detections.labels == ["cat", "dog"]
    np.testing.assert_allclose(detections.boxes[0], [40, 12, 160, 96], atol=0.1)  # in the middle; cut off below
    spec = pipe.task.spec
    assert (spec.colours, spec.fill, round(1 / spec.scale)) == ("RGB", (114.0,) * 3, 255)
    assert spec.outputs[0]["threshold"] == 0.25
    assert spec.outputs[0]["nms"] == 0.7
    model.set_rt_info("sideways", ["model_info", "resize_type"])
    ov.save_model(model, tmp_path / "info.xml", compress_to_fp16=False)
    with pytest.raises(ModelError, match="resize_type 'sideways' is not supported"):
        load(tmp_path / "info.xml")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"mean_values": "123.675 116.28 103.53", "scale_values": "58.395 57.12 57.375"}, "imagenet"),
        ({"mean_values": "0.485, 0.456, 0.406", "scale_values": "0.229 0.224 0.225"}, "imagenet"),
        ({"scale_values": "255"}, "unit"),
        ({"mean_values": "0 0 0", "scale_values": "255.0"}, "unit"),
    ],
)
def test_normalization_of_model_info(info: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", *ssd())
    model = ov.Core().read_model(folder / "model.xml")
    (folder / "model-proc.json").unlink()
    for key, value in {**info, "reverse_input_channels": "true"}.items():
        model.set_rt_info(value, ["model_info", key])
    ov.save_model(model, tmp_path / "info.xml", compress_to_fp16=False)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels = prepare(Image.fromarray(image), load(tmp_path / "info.xml").task.spec).pixels.transpose(1, 2, 0)
    unit = image / 255
    wanted = unit if expected == "unit" else (unit - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels, wanted, atol=1e-4)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"converter": "tensor_to_label"}, "converter 'tensor_to_label' is not one of a detector"),
        ({"converter": "yolo_v33"}, "Did you mean 'yolo_v3'"),
        ({"layer_name": "other"}, "has no output 'other'"),
        ({"iou_treshold": 1}, "unknown key `iou_treshold`. Did you mean 'iou_threshold'"),
        ({"converter": "yolo_v5"}, "no anchors"),
        ({"converter": "yolo_v3", "anchors": [1, 2], "masks": [0]}, "does not fit"),
        ({"converter": "yolo_v8"}, "no output as it is described"),
        ({"labels": "no.txt"}, "no.txt is missing"),
        ({"labels": "../no.txt"}, "lies elsewhere"),
        ({"anchors": ["x"]}, "anchors"),
        ({"confidence_threshold": 7}, "confidence_threshold"),
    ],
)
def test_descriptions_that_do_not_fit(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    output, description = ssd()
    folder = write_model(tmp_path / "m", output, {**description, **change})
    with pytest.raises(ModelError, match=match):
        load(folder)(Image.new("RGB", (20, 20)))


@pytest.mark.parametrize(
    ("pre", "match"),
    [
        ({"params": {"reszie": "no"}}, "Did you mean 'resize'"),
        ({"parms": {}}, "Did you mean 'params'"),
        ({"params": {"resize": "aspect"}}, "resize"),
        ({"params": {"mean": [0.5, 0.5, 0.5]}}, "mean and std go together"),
        ({"params": {"mean": [0.5, 0.4], "std": [1, 2]}}, "mean has 2 values"),
        ({"params": {"padding": {"stride": 60}}}, "padding leaves nothing"),
        ({"params": {"padding": {"stride": 1, "stride_x": 1}}}, "give stride, or"),
        ({"params": {"color_space": "GRAYSCALE"}}, "the input has 3 channels"),
        ({"params": {"range": [0]}}, "range"),
        ("image", "input_preproc"),
    ],
)
def test_preprocessing_that_is_not_understood(pre: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=match):
        load(write_model(tmp_path / "m", *ssd(), [pre]))


def test_scores_outside_0_to_1_are_refused(tmp_path: Path) -> None:
    output, description = yolo_v8()
    output[0, 5, 7] = 4.2
    with pytest.raises(ModelError, match=r"scores from .* to 4\.2, outside 0\.\.1"):
        found(write_model(tmp_path / "m", output, description))


def test_labels_of_a_file_and_of_a_list(tmp_path: Path) -> None:
    labels = ["x", "Red House", "Dr. Pepper can"]
    folder = write_model(tmp_path / "m", ssd()[0], [{"converter": "detection_output", "labels": "names.txt"}])
    (folder / "names.txt").write_text("\n".join(labels) + "\n")
    assert found(folder).labels == labels[1:]
    proc = folder.rename(tmp_path / "n") / "model-proc.json"
    detections = load(proc.parent / "model.xml", proc=str(proc))(Image.new("RGB", (9, 9))).detections[0]
    assert detections.labels == labels[1:]
    same = ["a", "a", "a"]
    assert found(write_model(tmp_path / "m", ssd()[0], {**ssd()[1], "labels": same})).labels == same[1:]


def test_a_model_that_says_nothing_of_itself(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", *ssd())
    proc = (folder / "model-proc.json").read_text()
    (folder / "model-proc.json").unlink()
    with pytest.raises(ModelError, match="--model-proc FILE"):
        load(folder)
    (folder / "other.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a model-proc"):
        load(folder / "model.xml", proc=str(folder / "other.json"))
    (folder / "model-proc.json").write_text(proc)
    result = load(folder, height=64)(Image.new("RGB", (WIDTH, HEIGHT)))  # a size that its operations can have
    np.testing.assert_allclose(result.detections[0].boxes, BOXES, atol=0.05)
    fixed = {"out": ssd()[0], "more": lambda given: ops.add(given["data"], np.zeros((1, 3, HEIGHT, WIDTH), np.float32))}
    folder = write_model(tmp_path / "fixed", fixed, ssd()[1])
    with pytest.raises(ConfigError, match=f"own height is {HEIGHT}, and it takes no other"):
        load(folder, height=64)
    batch = write_model(tmp_path / "batch", *ssd(), inputs={"data": [10, 3, HEIGHT, WIDTH]})
    np.testing.assert_allclose(load(batch)(Image.new("RGB", (WIDTH, HEIGHT))).detections[0].boxes, BOXES, atol=0.05)
    folder = write_model(tmp_path / "open", *ssd(), inputs={"data": [1, 3, -1, -1]})
    with pytest.raises(ConfigError, match=r"leaves the height of its input open(.|\n)*--size"):
        load(folder)
    result = load(folder, height=HEIGHT, width=WIDTH)(Image.new("RGB", (WIDTH, HEIGHT)))
    np.testing.assert_allclose(result.detections[0].boxes, BOXES, atol=0.05)
    with pytest.raises(ModelError, match=r"has no detector\n.*load.proc = .*--model-proc FILE"):
        ovforge.Pipeline("detect", source=folder / "model.xml", cache=None)


def test_contract(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    testing.check_loader(ovforge_detection, "model-proc", write_model(tmp_path / "m", *ssd()), other)


def test_flags_of_the_command_mean_what_the_model_needs(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["detect", *map(str, arguments), "--cache", str(tmp_path / "cache"), "-q"])

    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "picture.png")
    folder = write_model(tmp_path / "open", *ssd(), inputs={"data": [1, 3, -1, -1]})
    flags = (tmp_path / "picture.png", "-m", folder / "model.xml", "-o", tmp_path / "found.csv")
    assert "--model-proc FILE" in str(run(*flags).exception)
    described = (*flags, "--model-proc", folder / "model-proc.json")
    assert "--size HEIGHTxWIDTH" in str(run(*described).exception)
    assert "converted already" in str(run(*described, "--weights", "f32").exception)
    done = run(*described, "--size", f"{HEIGHT}x{WIDTH}")
    assert done.exit_code == 0, done.exception
    rows = (tmp_path / "found.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["cat", "dog"]
