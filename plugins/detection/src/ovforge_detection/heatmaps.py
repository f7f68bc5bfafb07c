"""Boxes of models that give maps of scores: faces by their centres, and text by its outline.

Sources: CenterFace (Xu et al. 2019) and differentiable binarization (Liao et al. 2020), as DL Streamer's converters
`centerface` and `heatmap_boxes` read them.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import PluginError

__all__ = ["faces", "outlined"]

Floats = NDArray[np.float32]

STRIDE = 4
"""Pixels of the input between two places of CenterFace's maps."""


def faces(heatmap: Floats, scale: Floats, offset: Floats, threshold: float, sides: Floats) -> tuple[Floats, Floats]:
    """Return the boxes (n, 4), corners within the input, and scores (n,) of faces.

    `heatmap` is (height, width), `scale` and `offset` (2, height, width), first down, then across; `sides` are width
    and height of the input.
    """
    rows, columns = np.nonzero(heatmap > threshold)
    extent = np.exp(np.minimum(scale[:, rows, columns], 50)) * STRIDE
    centre = (np.stack([rows, columns]) + offset[:, rows, columns] + 0.5) * STRIDE
    low = np.clip((centre - extent / 2)[::-1].T, 0, sides)
    high = np.minimum(low + extent[::-1].T, sides)
    return np.concatenate([low, high], 1).astype(np.float32), heatmap[rows, columns]


def outlined(heatmap: Floats, binarize: float, shortest: float) -> tuple[Floats, Floats]:
    """Return the boxes (n, 4), corners in places of the map, around what is above `binarize`, and scores (n,).

    A box is upright around the smallest turned rectangle of an outline; its score is the mean within the outline. Boxes
    with a side below `shortest` are left out. Raises PluginError without OpenCV.
    """
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        hint = 'Run: pip install "ovforge-detection[text]"'
        raise PluginError(f"outlines in a map are found by OpenCV: {error}", hint=hint) from error
    outlines, _ = cv2.findContours((heatmap > binarize).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes, scores = [], []
    for outline in outlines:
        corners = cv2.boxPoints(cv2.minAreaRect(outline))
        low, high = np.floor(corners.min(0)), np.ceil(corners.max(0)) + 1
        if (high - low).min() < shortest:
            continue
        left, top = outline.reshape(-1, 2).min(0)
        right, bottom = outline.reshape(-1, 2).max(0)
        inside = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
        cv2.fillPoly(inside, [outline - [left, top]], 1)
        boxes.append([*low, *high])
        scores.append(heatmap[top : bottom + 1, left : right + 1][inside > 0].mean())
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)
