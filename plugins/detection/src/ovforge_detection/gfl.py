"""Grids without anchors whose sides are distributions: NanoDet and other detectors of Generalized Focal Loss.

Source: "Generalized Focal Loss" (Li et al. 2020), and NanoDet's `nanodet_head.py`; older graphs keep scores and
distances of each grid apart, those of NanoDet-Plus hold both in one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge.model import DetectorSpec
from ovforge_detection.decode import sigmoid

__all__ = ["decode_gfl"]

Floats = NDArray[np.float32]
MOST_BINS = 33
"""The most bins that a side's distribution may have."""


def decode_gfl(
    outputs: Mapping[str, NDArray[Any]], classes: int | None, spec: DetectorSpec, threshold: float, logits: bool
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Return boxes (n, 4), corners in pixels of the input, scores (n,) and classes (n,) of the cells that count.

    `logits` says that scores are still without the logistic function. Raises ModelError for other outputs.
    """
    tables = [(*_split(table, classes), table.shape) for table in _tables(outputs, classes)]
    boxes, best, numbers = [], [], []
    for scores, sides, shape in tables:
        centres, strides = _centres(len(scores), spec, shape)
        if logits:
            scores = sigmoid(scores)
        top = scores.max(1)
        kept = np.flatnonzero(top >= threshold)
        middle, stride = centres[kept], strides[kept]
        distances = _expected(sides[kept]) * stride[:, None]
        boxes.append(np.concatenate([middle - distances[:, :2], middle + distances[:, 2:]], 1))
        best.append(top[kept])
        numbers.append(scores[kept].argmax(1))
    return (
        np.concatenate(boxes).astype(np.float32),
        np.concatenate(best).astype(np.float32),
        np.concatenate(numbers).astype(np.int64),
    )


def _tables(outputs: Mapping[str, NDArray[Any]], classes: int | None) -> list[Floats]:
    """Return the tables (cells, classes + 4 x bins), one for each grid, or one for all."""
    values = [np.asarray(v[0] if v.ndim == 3 else v, np.float32) for v in {id(v): v for v in outputs.values()}.values()]
    if any(value.ndim != 2 for value in values) or not values:
        raise _unlike(outputs)
    if len(values) == 1:
        return values
    tables = []
    for count in sorted({len(value) for value in values}, reverse=True):
        pair = [value for value in values if len(value) == count]
        if len(pair) != 2:
            raise _unlike(outputs)
        if classes is None:
            pair.sort(key=lambda value: value.shape[1], reverse=True)
        else:
            pair.sort(key=lambda value: value.shape[1] != classes)
        tables.append(np.concatenate(pair, 1))
    return tables


def _split(table: Floats, classes: int | None) -> tuple[Floats, Floats]:
    """Return the scores (cells, classes) of a table, and the distributions (cells, 4, bins) of its sides."""
    if classes is None:
        raise ModelError(
            "it does not say how many classes there are", where="output_postproc", hint="Give labels, or classes."
        )
    bins, rest = divmod(table.shape[1] - classes, 4)
    if rest or not 2 <= bins <= MOST_BINS:
        raise ModelError(
            f"{table.shape[1]} numbers a cell do not hold {classes} classes and four distributions",
            where="output_postproc",
            hint="Compare labels or classes with the model.",
        )
    return table[:, :classes], table[:, classes:].reshape(-1, 4, bins)


def _expected(logits: Floats) -> Floats:
    """Return the expectation of distributions (n, 4, bins), as (n, 4)."""
    raised = np.exp(logits - logits.max(2, keepdims=True))
    shares = raised / raised.sum(2, keepdims=True)
    means: Floats = shares @ np.arange(logits.shape[2], dtype=np.float32)
    return means


def _centres(cells: int, spec: DetectorSpec, shape: Sequence[int]) -> tuple[Floats, Floats]:
    """Return the middles (cells, 2) and strides (cells,) of the grid, or the grids together, of so many cells.

    The middle of a cell lies half a stride from its corner if one grid comes alone, and at its corner if a table holds
    several grids (NanoDet-Plus).
    """
    height, width = spec.height or 0, spec.width or 0
    alone = isqrt(max(1, height * width // max(1, cells)))
    for stride in range(max(1, alone - 2), alone + 3):
        if ceil(height / stride) * ceil(width / stride) == cells:
            return _grid(height, width, stride, 0.5)
    for strides in ((8, 16, 32, 64), (8, 16, 32)):
        if sum(ceil(height / stride) * ceil(width / stride) for stride in strides) == cells:
            grids = [_grid(height, width, stride, 0.0) for stride in strides]
            return np.concatenate([grid[0] for grid in grids]), np.concatenate([grid[1] for grid in grids])
    raise ModelError(
        f"an output of {list(shape)} is not a grid of an input of {width}x{height}",
        where="output_postproc",
        hint="Is it another converter?",
    )


def _grid(height: int, width: int, stride: int, shift: float) -> tuple[Floats, Floats]:
    rows, columns = np.mgrid[: ceil(height / stride), : ceil(width / stride)].astype(np.float32)
    middles = np.stack([columns.ravel(), rows.ravel()], 1) + np.float32(shift)
    return middles * np.float32(stride), np.full(rows.size, stride, np.float32)


def _unlike(outputs: Mapping[str, NDArray[Any]]) -> ModelError:
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
    return ModelError(
        "the model has no outputs of scores and distributions for its grids",
        where="output_postproc",
        hint=f"It has {shapes}. Is it another converter?",
    )
