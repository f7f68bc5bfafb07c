"""Outputs of ready models of SSD's and YOLO's kind, as Intel's model-proc describes them, into boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ovforge.errors import ModelError
from ovforge.model import DetectorSpec
from ovforge_detection.decode import Found, check_finite, corners, sigmoid
from ovforge_detection.prepare import Prepared

__all__ = ["Description", "decode_described"]

Floats = NDArray[np.float32]
Raw = tuple[Floats, Floats, NDArray[np.int64]]
"""Boxes (n, 4) in pixels of the input, scores (n,), classes (n,)."""


class Description(BaseModel):
    """One output: which, and how it is read. Anchors are pixels of the input, width before height."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    converter: Literal["ssd", "boxes_labels", "yolo_v3", "yolo_v5", "yolo_v8"]
    layer_name: str | None = None
    classes: int | None = Field(None, gt=0)
    anchors: tuple[float, ...] = ()
    masks: dict[int, tuple[int, ...]] = Field(default_factory=dict, description="Side of the grid -> its anchors.")
    sigmoid: bool = Field(False, description="Whether YOLO's grids are still without the logistic function.")


def decode_described(outputs: Mapping[str, Floats], spec: DetectorSpec, picture: Prepared, threshold: float) -> Found:
    """Return boxes above `threshold` of all outputs, those of one thing still beside each other."""
    parts = [_READERS[d.converter](_pick(outputs, d), d, spec) for d in map(Description.model_validate, spec.outputs)]
    boxes, scores, classes = (np.concatenate(each) for each in zip(*parts, strict=True))
    check_finite(boxes, scores)
    kept = scores > threshold
    return Found(picture.restored(boxes[kept]), scores[kept].astype(np.float32), classes[kept].astype(np.int64))


def _pick(outputs: Mapping[str, Floats], described: Description) -> Mapping[str, Floats]:
    """Return the outputs that a description is about."""
    if described.layer_name is None or described.converter == "boxes_labels":
        return outputs
    if described.layer_name not in outputs:
        raise ModelError(
            f"the model has no output {described.layer_name!r}",
            where="output_postproc",
            hint=f"It has: {', '.join(sorted(outputs)) or 'no named ones'}.",
        )
    return {described.layer_name: outputs[described.layer_name]}


def _ssd(outputs: Mapping[str, Floats], described: Description, spec: DetectorSpec) -> Raw:
    """Read rows of picture, class, score, left, top, right, bottom, relative to the input; picture -1 ends them."""
    rows = _only(outputs, 4, 7).reshape(-1, 7)
    ends = np.flatnonzero(rows[:, 0] < 0)
    rows = rows[: ends[0]] if len(ends) else rows
    return rows[:, 3:] * _sides(spec), rows[:, 2], rows[:, 1].astype(np.int64)


def _boxes_labels(outputs: Mapping[str, Floats], described: Description, spec: DetectorSpec) -> Raw:
    """Read `boxes` (n, 5), corners in pixels of the input and score, and `labels` (n,)."""
    try:
        boxes, labels = outputs["boxes"].reshape(-1, 5), outputs["labels"].reshape(-1)
    except (KeyError, ValueError) as error:
        raise ModelError(f"has no boxes (n, 5) and labels (n,): {error}", where="output_postproc") from error
    return boxes[:, :4], boxes[:, 4], labels.astype(np.int64)


def _yolo_grids(outputs: Mapping[str, Floats], described: Description, spec: DetectorSpec) -> Raw:
    """Read grids (1, anchors x (5 + classes), height, width). Source: YOLOv3 (Redmon, Farhadi 2018)."""
    parts = []
    for grid in outputs.values():
        if described.converter == "yolo_v5" and grid.ndim == 3:
            parts.append(_flat(grid[0]))
            continue
        anchors = _anchors(grid, described)
        if grid.ndim != 4 or grid.shape[1] % len(anchors) or grid.shape[1] // len(anchors) < 6:
            raise ModelError(
                f"a grid of {list(grid.shape)} does not fit {len(anchors)} anchors", where="output_postproc"
            )
        height, width = grid.shape[2:]
        cells = grid[0].reshape(len(anchors), -1, height, width)
        v5 = described.converter == "yolo_v5"
        values = sigmoid(cells) if v5 or described.sigmoid else cells
        columns, rows = np.arange(width), np.arange(height)[:, None]
        across, down = _sides(spec)[:2]
        if v5:
            x, y = values[:, 0] * 2 - 0.5 + columns, values[:, 1] * 2 - 0.5 + rows
            extent = (values[:, 2:4] * 2) ** 2
        else:
            x, y = values[:, 0] + columns, values[:, 1] + rows
            extent = np.exp(np.minimum(cells[:, 2:4], 50))
        extent = extent * anchors[:, :, None, None]
        boxes = np.stack([x / width * across, y / height * down, extent[:, 0], extent[:, 1]], -1).reshape(-1, 4)
        scores = (values[:, 5:] * values[:, 4:5]).transpose(0, 2, 3, 1).reshape(len(boxes), -1)
        parts.append((corners(boxes.astype(np.float32)), scores.max(1), scores.argmax(1)))
    boxes, scores, classes = (np.concatenate(each) for each in zip(*parts, strict=True))
    return boxes, scores, classes


def _flat(rows: Floats) -> Raw:
    """Read rows of centre, size in pixels, objectness, and a score for each class."""
    scores = rows[:, 5:] * rows[:, 4:5]
    return corners(rows[:, :4]), scores.max(1), scores.argmax(1)


def _yolo_v8(outputs: Mapping[str, Floats], described: Description, spec: DetectorSpec) -> Raw:
    """Read (1, 4 + classes, n): centre and size in pixels of the input, and a score for each class."""
    output = _only(outputs, 3)[0]
    if described.classes is not None and output.shape[0] != 4 + described.classes:
        output = output.T
    if output.shape[0] < 5:
        raise ModelError(f"{list(output.shape)} are no boxes and classes", where="output_postproc")
    return corners(output[:4].T), output[4:].max(0), output[4:].argmax(0)


_READERS: dict[str, Callable[[Mapping[str, Floats], Description, DetectorSpec], Raw]] = {
    "ssd": _ssd,
    "boxes_labels": _boxes_labels,
    "yolo_v3": _yolo_grids,
    "yolo_v5": _yolo_grids,
    "yolo_v8": _yolo_v8,
}


def _only(outputs: Mapping[str, Floats], rank: int, last: int | None = None) -> Floats:
    """Return the one output of a shape; an output may have several names."""
    fitting = [o for o in outputs.values() if o.ndim == rank and (last is None or o.shape[-1] == last)]
    if not fitting:
        shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items())
        raise ModelError(
            "the model has no output as it is described",
            where="output_postproc",
            hint=f"It has {shapes}. Is it another converter?",
        )
    return fitting[0]


def _anchors(grid: Floats, described: Description) -> NDArray[Any]:
    """Return the anchors of a grid, (n, 2)."""
    pairs = np.array(described.anchors, np.float32).reshape(-1, 2)
    numbers = described.masks.get(grid.shape[-1]) if described.masks else tuple(range(len(pairs)))
    if not len(pairs) or numbers is None or (numbers and max(numbers) >= len(pairs)):
        raise ModelError(
            f"no anchors are given for a grid of {grid.shape[-1]} cells",
            where="output_postproc",
            hint="Give anchors, and masks: the side of each grid with the numbers of its anchors.",
        )
    return pairs[list(numbers)]


def _sides(spec: DetectorSpec) -> Floats:
    return np.array([spec.width, spec.height] * 2, np.float32)
