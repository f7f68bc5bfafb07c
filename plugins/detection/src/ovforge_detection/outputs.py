"""Outputs of ready models into boxes, as the converters of DL Streamer read them.

Source: its `post_processor/converters/to_roi`; where that reads an output's rows and columns by one layout only (grids
that are not square, channels last), the output's own layout counts here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ovforge.errors import ModelError
from ovforge.model import DetectorSpec
from ovforge_detection.decode import Found, check_finite, corners, join, sigmoid, suppress
from ovforge_detection.gfl import decode_gfl
from ovforge_detection.heatmaps import faces, outlined
from ovforge_detection.prepare import Prepared

__all__ = ["Description", "decode_described"]

CELL = 32
"""Pixels of a cell of the coarsest grid, if neither the description nor the output's shape says how many there are."""

NEAR = 1e-3
"""How far a score may lie outside 0..1, by rounding."""

Floats = NDArray[np.float32]
Values = NDArray[Any]
Raw = tuple[Floats, Floats, NDArray[np.int64]]
"""Boxes (n, 4), corners in pixels of the input, scores (n,), classes (n,)."""


class Description(BaseModel):
    """One entry of output_postproc: which outputs, and how they are read. Anchors are pairs of width and height."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    converter: Literal[
        "detection_output", "boxes_labels", "boxes_scores", "boxes", "yolo_v2", "yolo_v3", "yolo_v5", "yolo_v7",
        "yolo_v8", "yolo_v8_obb", "yolo_v8_pose", "yolo_v8_seg", "yolo_v10", "yolo_v26_obb", "yolo_x", "mask_rcnn",
        "rtdetr", "rfdetr", "detection", "centerface", "heatmap_boxes", "paddle_detection", "gfl",
    ]  # fmt: skip
    layers: tuple[str, ...] = Field((), description="The outputs that it is about; by default all.")
    classes: int | None = Field(None, gt=0)
    labels: int = Field(0, ge=0, description="How many labels there are, from number `first` on.")
    first: int = Field(0, ge=0)
    anchors: tuple[float, ...] = ()
    masks: tuple[int, ...] | dict[int, tuple[int, ...]] = Field(
        (), description="Anchors of each grid, from the coarsest on; or side of the grid -> its anchors."
    )
    boxes: int | None = Field(None, gt=0, description="Boxes of a cell.")
    cells: tuple[int, int] | None = Field(None, description="Cells of the coarsest grid, across and down.")
    sigmoid: bool = Field(False, description="Whether places and confidences are still without the logistic function.")
    softmax: bool = Field(False, description="Whether the scores of classes are still without softmax.")
    roi_scale: float = Field(1.0, gt=0, description="Boxes are made so much larger about their middle.")
    binarize: float = Field(0.3, ge=0, le=255, description="What counts in a map of scores.")
    shortest: float = Field(5.0, ge=0, description="Side that boxes of a map need, in its places.")
    threshold: float = Field(0.5, ge=0, le=1)
    nms: float | None = Field(None, ge=0, le=1)


def decode_described(
    outputs: Mapping[str, Values], spec: DetectorSpec, picture: Prepared, threshold: float | None, *, suppressed: bool
) -> Found:
    """Return the boxes of all descriptions whose scores reach `threshold`, by default that of each description.

    With `suppressed`, of two boxes that overlap the one of the lower score goes, whatever their labels, as far as the
    description says so. Raises ModelError for outputs that are not as described, and for scores outside 0..1.
    """
    parts = []
    spec = spec.model_copy(update={"height": picture.canvas[0], "width": picture.canvas[1]})
    for entry in spec.outputs:
        described = Description.model_validate(entry)
        if threshold is not None:
            described = described.model_copy(update={"threshold": threshold})
        parts.append(_decoded(_picked(outputs, described), described, spec, picture, suppressed=suppressed))
    return join(parts)


def _decoded(
    outputs: Mapping[str, Values], described: Description, spec: DetectorSpec, picture: Prepared, *, suppressed: bool
) -> Found:
    boxes, scores, classes = _READERS[described.converter](outputs, described, spec, picture)
    check_finite(boxes, scores)
    _check_scores(scores[scores != -1], spec)  # -1 marks rows that are not used
    low, high = boxes[:, :2], boxes[:, 2:]
    if described.roi_scale != 1:
        middle, half = (low + high) / 2, (high - low) / 2 * np.float32(described.roi_scale)
        boxes = np.concatenate([middle - half, middle + half], 1)
    kept = (scores >= described.threshold) & _valid(boxes / _sides(spec))
    found = Found(boxes[kept], np.clip(scores[kept], 0, 1), classes[kept].astype(np.int64) + described.first)
    if suppressed and described.nms is not None:
        found = suppress(found, described.nms, across=True)
    return Found(picture.restored(found.boxes), found.scores.astype(np.float32), found.classes)


def _check_scores(scores: Floats, spec: DetectorSpec) -> None:
    if len(scores) and not (scores.min() >= -NEAR and scores.max() <= 1 + NEAR):
        raise ModelError(
            f"gave scores from {scores.min():.3g} to {scores.max():.3g}, outside 0..1",
            where="detector",
            hint="Is it another converter? Or output_postproc lacks output_sigmoid_activation or do_cls_softmax.",
        )


def _valid(boxes: Floats) -> NDArray[np.bool_]:
    """Say which relative boxes count: not empty, and no more than half outside above or left, as DL Streamer has it.

    Source: `isDetectionValid`, which takes a box's corner for its middle.
    """
    low, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    inside = (low - extent / 2 <= 1) & (low + extent / 2 >= 0)
    return np.asarray(((extent > 0) & inside).all(1), np.bool_)


def _picked(outputs: Mapping[str, Values], described: Description) -> Mapping[str, Values]:
    """Return the outputs that a description is about."""
    if missing := [name for name in described.layers if name not in outputs]:
        raise ModelError(
            f"the model has no output {missing[0]!r}",
            where="output_postproc",
            hint=f"It has: {', '.join(sorted(outputs)) or 'no named ones'}.",
        )
    return {name: outputs[name] for name in described.layers} if described.layers else outputs


# -- lists of boxes ---------------------------------------------------------------------------------------------------


def _detection_output(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read rows of picture, class, score, left, top, right, bottom, relative to the input; picture -1 ends them."""
    rows = _only(outputs, lambda shape: len(shape) >= 2 and shape[-1] == 7).reshape(-1, 7).astype(np.float32)
    ends = np.flatnonzero(rows[:, 0] != 0)
    rows = rows[: ends[0]] if len(ends) else rows
    return rows[:, 3:] * _sides(spec), rows[:, 2], rows[:, 1].astype(np.int64)


def _boxes_labels(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read `boxes` (n, 5), corners in pixels of the input and score, and `labels` (n,)."""
    boxes = _boxes_of(outputs)
    labels = _named(outputs, "labels").reshape(-1)
    if len(labels) != len(boxes):
        raise ModelError(f"has {len(boxes)} boxes and {len(labels)} labels", where="output_postproc")
    return boxes[:, :4], boxes[:, 4], labels.astype(np.int64)


def _boxes(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read `boxes` (n, 5) of one class."""
    boxes = _boxes_of(outputs)
    return boxes[:, :4], boxes[:, 4], np.zeros(len(boxes), np.int64)


def _boxes_scores(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read `boxes` (n, 4 or 5): left, top, width, height, relative, and `scores` (n, 1, classes)."""
    boxes, scores = _boxes_of(outputs), _named(outputs, "scores").astype(np.float32)
    scores = scores.reshape(-1, scores.shape[-1])
    if len(scores) != len(boxes):
        raise ModelError(f"has {len(boxes)} boxes and {len(scores)} scores", where="output_postproc")
    scores = _softmax(scores, 1) if d.softmax else scores
    placed = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]], 1) * _sides(spec)
    return placed, scores.max(1) * boxes[:, 4], scores.argmax(1)


def _boxes_of(outputs: Mapping[str, Values]) -> Floats:
    """Return the output `boxes` as (n, 5), scores last; those without scores get 1."""
    boxes = _named(outputs, "boxes").astype(np.float32)
    if boxes.ndim < 2 or boxes.shape[-1] not in (4, 5):
        raise ModelError(f"its boxes are {list(boxes.shape)}, not (n, 4) or (n, 5)", where="output_postproc")
    rows = boxes.reshape(-1, boxes.shape[-1])
    return rows if rows.shape[1] == 5 else np.pad(rows, ((0, 0), (0, 1)), constant_values=1)


def _mask_rcnn(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read boxes of a Mask R-CNN, not its masks: `boxes` (n, 5) and `labels` from 0 on, or rows as of an SSD."""
    if "labels" in outputs:
        boxes, scores, labels = _boxes_labels(outputs, d, spec, picture)
        return boxes, scores, labels + 1
    rows = _only(outputs, lambda shape: len(shape) >= 2 and shape[-1] == 7).reshape(-1, 7).astype(np.float32)
    return rows[:, 3:] * _sides(spec), rows[:, 2], rows[:, 1].astype(np.int64)


def _yolo_v10(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read rows of left, top, right, bottom in pixels of the input, score and class, and more that is not a box.

    Of turned boxes, rows have centre and size, and an angle at the end: the box is the one before it is turned.
    """
    turned = d.converter == "yolo_v26_obb"
    rows = _only(outputs, lambda shape: len(shape) in (2, 3) and shape[-1] >= 6 + turned)
    rows = rows.reshape(-1, rows.shape[-1]).astype(np.float32)
    classes = rows[:, 5].astype(np.int64)
    boxes = corners(rows[:, :4]) if turned else rows[:, :4]
    return boxes, rows[:, 4], classes % d.labels if d.labels else classes


def _queries(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read boxes (n, 4), relative centre and size, and a score for each class: one box of a query."""
    boxes = _only(outputs, lambda shape: len(shape) >= 2 and shape[-1] == 4).reshape(-1, 4).astype(np.float32)
    logits = _only(outputs, lambda shape: len(shape) in (2, 3) and shape[-1] != 4 and shape[-2] == len(boxes))
    logits = logits.reshape(len(boxes), -1).astype(np.float32)
    scores = _softmax(logits, 1) if d.converter == "rtdetr" else sigmoid(logits)
    scores = scores[:, : d.labels or None]
    return corners(boxes) * _sides(spec), scores.max(1), scores.argmax(1)


def _detection(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read what torchvision's detectors give: boxes, labels and scores, or rows that hold them together."""
    each = _distinct(outputs)
    flat = [value for value in each if value.ndim == 1]
    table = _only(
        outputs, lambda shape: len(shape) >= 2 and shape[-1] in (4, 5, 7) and (len(shape) < 3 or shape[0] == 1)
    )
    rows = table.reshape(-1, table.shape[-1]).astype(np.float32)
    scores = next((value for value in flat if np.issubdtype(value.dtype, np.floating)), None)
    labels = next((value for value in flat if value is not scores), np.zeros(len(rows), np.int64))
    boxes = rows[:, :4]
    if rows.shape[1] == 7:
        rows = rows[rows[:, 0] == 0]
        boxes, scores, labels = rows[:, 3:], rows[:, 2], rows[:, 1]
    elif rows.shape[1] == 5:
        scores, labels = rows[:, 4], labels if scores is None else scores
    if scores is None or not len(boxes) == len(scores) == len(labels):
        raise _unlike(outputs)
    relative = (boxes < 2).all(1, keepdims=True)
    return np.where(relative, boxes * _sides(spec), boxes), scores.astype(np.float32), labels.astype(np.int64)


def _paddle(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read rows of class, score, left, top, right, bottom in pixels of the picture; class -1 for none.

    Source: the exported detectors of PaddleDetection, which divide by their input `scale_factor`.
    """
    rows = _only(outputs, lambda shape: len(shape) == 2 and shape[-1] == 6).astype(np.float32)
    rows = rows[rows[:, 0] >= 0]
    boxes = rows[:, 2:] * np.array(picture.scale * 2, np.float32) + np.array(picture.shift * 2, np.float32)
    return boxes, rows[:, 1], rows[:, 0].astype(np.int64)


# -- YOLO -------------------------------------------------------------------------------------------------------------


def _yolo_grids(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read grids of cells. Source: YOLO v2 and v3 (Redmon, Farhadi 2017, 2018), v4 (Bochkovskiy et al. 2020), v5."""
    if d.converter == "yolo_v5" and not d.anchors and any(value.ndim == 3 for value in outputs.values()):
        return _yolo_v7(outputs, d, spec, picture)  # as YOLOv5 is exported now, with its boxes made
    grids = sorted(_distinct(outputs), key=lambda grid: grid.size)
    pairs = np.array(d.anchors, np.float32).reshape(-1, 2)
    count = d.boxes or len(pairs) // max(1, len(grids))
    if not count:
        raise ModelError(
            "no anchors are given", where="output_postproc", hint="Give the anchors that it was trained with."
        )
    parts = []
    for place, grid in enumerate(grids):
        cells = _cells(grid, count, d, spec)
        parts.append(_grid_boxes(cells, _anchors(cells.shape[2:], place, count, len(grids), d), d, spec))
    boxes, scores, classes = (np.concatenate(each) for each in zip(*parts, strict=True))
    return boxes, scores, classes


def _grid_boxes(cells: Floats, anchors: Floats, d: Description, spec: DetectorSpec) -> Raw:
    """Return the boxes of a grid (anchors, 5 + classes, height, width)."""
    height, width = cells.shape[2:]
    across, down = _sides(spec)[:2]
    x, y, extent = cells[:, 0], cells[:, 1], cells[:, 2:4]
    x, y, confidence = (sigmoid(each) if d.sigmoid else each for each in (x, y, cells[:, 4]))
    probabilities = _softmax(cells[:, 5:], 1) if d.softmax else cells[:, 5:]
    if d.converter == "yolo_v5":
        x, y, extent = x * 2 - 0.5, y * 2 - 0.5, (sigmoid(extent) * 2) ** 2
    else:
        extent = np.exp(np.minimum(extent, 50))
    extent = extent * anchors[:, :, None, None]
    if d.converter == "yolo_v2":  # its anchors are cells, not pixels
        extent = extent * np.array([across / width, down / height], np.float32)[:, None, None]
    columns, rows = np.arange(width), np.arange(height)[:, None]
    centres = ((x + columns) / width * across, (y + rows) / height * down)
    boxes = np.stack([*centres, extent[:, 0], extent[:, 1]], -1).reshape(-1, 4).astype(np.float32)
    best = np.maximum(probabilities.max(1), 0)
    sure = confidence >= d.threshold
    _check_scores(np.concatenate([confidence[sure], probabilities.transpose(0, 2, 3, 1)[sure].ravel()]), spec)
    scores = np.where(sure, confidence * best, 0).astype(np.float32)
    return corners(boxes), scores.ravel(), probabilities.argmax(1).ravel()


def _cells(grid: Values, count: int, d: Description, spec: DetectorSpec) -> Floats:
    """Return a grid as (boxes of a cell, 5 + classes, height, width), from (1, C, H, W), (1, H, W, C) or flat."""
    classes = d.classes or d.labels or None
    wanted = count * (5 + classes) if classes else None

    def fits(channels: int) -> bool:
        return channels == wanted if wanted else channels % count == 0 and channels // count > 5

    values = grid.astype(np.float32)
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and fits(values.shape[0]):
        return values.reshape(count, -1, *values.shape[1:])
    if values.ndim == 3 and fits(values.shape[2]):
        values = values.transpose(2, 0, 1)
        return values.reshape(count, -1, *values.shape[1:])
    assert spec.height is not None
    assert spec.width is not None
    width, height = d.cells or (spec.width // CELL, spec.height // CELL)
    channels, rest = divmod(grid.size, max(1, width * height))
    if max(values.shape) != values.size or rest or not fits(channels):
        known = f" and {classes} classes" if classes else ""
        raise ModelError(
            f"a grid of {list(grid.shape)} does not fit {count} boxes a cell{known}",
            where="output_postproc",
            hint="Compare anchors, classes, labels, bbox_number_on_cell and cells_number with the model's outputs.",
        )
    return values.reshape(count, -1, height, width)


def _anchors(sides: Sequence[int], place: int, count: int, grids: int, d: Description) -> Floats:
    """Return the anchors (count, 2) of a grid of `sides` (height, width), the one at `place` from the coarsest on."""
    pairs = np.array(d.anchors, np.float32).reshape(-1, 2)
    if isinstance(d.masks, dict):
        numbers: Sequence[int] = next((d.masks[side] for side in sides if side in d.masks), ())
    elif d.masks:
        numbers = d.masks[place * count : (place + 1) * count]
    else:
        numbers = range(len(pairs)) if grids == 1 else ()
    if len(numbers) != count or max(numbers) >= len(pairs):
        raise ModelError(
            f"no anchors are given for a grid of {sides[1]}x{sides[0]} cells",
            where="output_postproc",
            hint=f"Give anchors, and masks: for each grid, from the coarsest on, the numbers of its {count} anchors.",
        )
    return pairs[list(numbers)]


def _yolo_v7(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read rows of centre, size in pixels, confidence, and a score for each class."""
    return _rows(_only(outputs, lambda shape: len(shape) in (2, 3) and shape[-1] > 5))


def _yolo_x(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read rows as those of v7 for the cells of strides 8, 16 and 32, in cells. Source: YOLOX (Ge et al. 2021)."""
    assert spec.height is not None
    assert spec.width is not None
    table = _only(outputs, lambda shape: len(shape) >= 2 and shape[-1] > 5)
    rows = table.reshape(-1, table.shape[-1]).astype(np.float32)
    cells = [
        (column, row, stride)
        for stride in (8, 16, 32)
        for row in range(spec.height // stride)
        for column in range(spec.width // stride)
    ]
    if len(cells) != len(rows) or (d.classes and rows.shape[1] != 5 + d.classes):
        raise _unlike(outputs)
    columns, lines, strides = np.array(cells, np.float32).T
    centres = [(rows[:, 0] + columns) * strides, (rows[:, 1] + lines) * strides]
    extents = [np.exp(np.minimum(rows[:, n], 50)) * strides for n in (2, 3)]
    return _rows(np.concatenate([np.stack([*centres, *extents], 1), rows[:, 4:]], 1))


def _rows(table: Values) -> Raw:
    rows = table.reshape(-1, table.shape[-1]).astype(np.float32)
    return corners(rows[:, :4]), rows[:, 4] * rows[:, 5:].max(1), rows[:, 5:].argmax(1)


def _yolo_v8(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read (1, 4 + classes, n): centre and size in pixels of the input, and a score for each class.

    After the classes come the angle of a turned box, which is read before it is turned, three values for each point of
    a pose, whose only class is the first, or a weight for each of the masks (1, masks, height, width).
    """
    output = _only(outputs, lambda shape: len(shape) == 3)[0].astype(np.float32)
    more = 0
    match d.converter:
        case "yolo_v8_obb":
            more = 1
        case "yolo_v8_seg":
            more = _only(outputs, lambda shape: len(shape) == 4).shape[1]
        case "yolo_v8_pose":
            output = output if (output.shape[0] - 5) % 3 == 0 else output.T
            more = output.shape[0] - 5
    classes = d.classes or d.labels
    if classes and output.shape[0] != 4 + classes + more and output.shape[1] == 4 + classes + more:
        output = output.T
    if output.shape[0] < 5 + more:
        raise _unlike(outputs)
    scores = output[4 : len(output) - more]
    return corners(output[:4].T), scores.max(0), scores.argmax(0)


# -- maps -------------------------------------------------------------------------------------------------------------


def _centerface(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read `heatmap` (1, 1, h, w), `scale` and `offset` (1, 2, h, w); `landmarks` are left out.

    Outputs that have other names come in this order, as the original's do.
    """
    names = ("heatmap", "scale", "offset")
    found = [outputs[name] for name in names] if set(names) <= outputs.keys() else _distinct(outputs)[:3]
    maps = [value.astype(np.float32) for value in found]
    channels = [value.shape[:2] for value in maps]
    if channels != [(1, 1), (1, 2), (1, 2)] or len({value.shape[2:] for value in maps}) != 1:
        raise _unlike(outputs)
    boxes, scores = faces(maps[0][0, 0], maps[1][0], maps[2][0], d.threshold, _sides(spec)[:2])
    return boxes, scores, np.zeros(len(boxes), np.int64)


def _heatmap(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read a map of scores (1, 1, h, w), of which the first channel counts."""
    values = _only(outputs, lambda shape: len(shape) == 4)[0, 0].astype(np.float32)
    check_finite(values[None], np.zeros(0, np.float32))
    boxes, scores = outlined(values, d.binarize, d.shortest)
    height, width = values.shape
    places: Floats = np.array([width, height] * 2, np.float32)
    placed: Floats = boxes * (_sides(spec) / places)
    return placed, scores, np.zeros(len(boxes), np.int64)


def _gfl(outputs: Mapping[str, Values], d: Description, spec: DetectorSpec, picture: Prepared) -> Raw:
    """Read scores and distributions of the sides. Source: Generalized Focal Loss (Li et al. 2020)."""
    return decode_gfl(outputs, d.classes or d.labels or None, spec, d.threshold, d.sigmoid)


_READERS: dict[str, Callable[[Mapping[str, Values], Description, DetectorSpec, Prepared], Raw]] = {
    "detection_output": _detection_output, "boxes_labels": _boxes_labels, "boxes_scores": _boxes_scores,
    "boxes": _boxes, "yolo_v2": _yolo_grids, "yolo_v3": _yolo_grids, "yolo_v5": _yolo_grids, "yolo_v7": _yolo_v7,
    "yolo_v8": _yolo_v8, "yolo_v8_obb": _yolo_v8, "yolo_v8_pose": _yolo_v8, "yolo_v8_seg": _yolo_v8,
    "yolo_v10": _yolo_v10, "yolo_v26_obb": _yolo_v10, "yolo_x": _yolo_x, "mask_rcnn": _mask_rcnn, "rtdetr": _queries,
    "rfdetr": _queries, "detection": _detection, "centerface": _centerface, "heatmap_boxes": _heatmap,
    "paddle_detection": _paddle, "gfl": _gfl,
}  # fmt: skip


# -- outputs ----------------------------------------------------------------------------------------------------------


def _distinct(outputs: Mapping[str, Values]) -> list[Values]:
    """Return the outputs, once each: an output may have several names."""
    return list({id(value): value for value in outputs.values()}.values())


def _named(outputs: Mapping[str, Values], name: str) -> Values:
    if name not in outputs:
        raise _unlike(outputs)
    return outputs[name]


def _only(outputs: Mapping[str, Values], fits: Callable[[tuple[int, ...]], bool]) -> Values:
    """Return the output of a shape."""
    fitting = [value for value in _distinct(outputs) if fits(value.shape)]
    if not fitting:
        raise _unlike(outputs)
    return fitting[0]


def _unlike(outputs: Mapping[str, Values]) -> ModelError:
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
    return ModelError(
        "the model has no output as it is described",
        where="output_postproc",
        hint=f"It has {shapes}. Is it another converter?",
    )


def _softmax(values: Floats, axis: int) -> Floats:
    raised = np.exp(values - values.max(axis, keepdims=True))
    shares: Floats = raised / raised.sum(axis, keepdims=True)
    return shares


def _sides(spec: DetectorSpec) -> Floats:
    return np.array([spec.width, spec.height] * 2, np.float32)
