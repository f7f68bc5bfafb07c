"""Outputs of detectors into boxes, scores and classes: those that read text, and those with classes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge_detection.phrases import Passage
from ovforge_detection.prepare import Prepared

__all__ = ["MAX_CLASSES", "Found", "corners", "decode_classes", "decode_text", "join", "overlap", "sigmoid", "suppress"]

Floats = NDArray[np.float32]

MAX_CLASSES = 100_000
"""Most classes of a detector: the largest vocabularies of objects have a fifth of that."""


@dataclass(frozen=True)
class Found:
    """Boxes (n, 4) in pixels of the picture, scores and classes (n,); words and token spans (n, 2), if any."""

    boxes: Floats
    scores: Floats
    classes: NDArray[np.int64]
    words: Sequence[str] = ()
    spans: NDArray[np.int64] | None = None

    def take(self, which: NDArray[np.int64]) -> Found:
        """Return these of them."""
        return Found(
            self.boxes[which], self.scores[which], self.classes[which], [self.words[n] for n in which if self.words],
            None if self.spans is None else self.spans[which],
        )  # fmt: skip


def join(parts: Sequence[Found]) -> Found:
    """Return several passes over one picture as one."""
    spans = [part.spans for part in parts if part.spans is not None]
    return Found(
        np.concatenate([part.boxes for part in parts]), np.concatenate([part.scores for part in parts]),
        np.concatenate([part.classes for part in parts]), [word for part in parts for word in part.words],
        np.concatenate(spans) if spans else None,
    )  # fmt: skip


def decode_text(
    logits: Floats, boxes: Floats, passage: Passage, picture: Prepared, threshold: float, text_threshold: float
) -> Found:
    """Return the queries whose best token scores above `threshold`. `logits` (queries, tokens), `boxes` (queries, 4).

    A box's class is the phrase of its best token, its words are those of the phrase's tokens above `text_threshold`.
    """
    check_finite(logits, boxes)
    scores = sigmoid(logits)
    best = scores.max(axis=1)
    kept = np.flatnonzero(best > threshold)
    scores, inside = scores[kept], passage.phrases >= 0
    owned = np.where(inside, scores, -1)
    classes = passage.phrases[owned.argmax(axis=1)]
    spans, words = np.zeros((len(kept), 2), np.int64), []
    for row, (score, number) in enumerate(zip(scores, classes, strict=True)):
        named = np.flatnonzero((passage.phrases == number) & (score > text_threshold))
        spans[row] = (named[0], named[-1] + 1) if len(named) else (0, 0)
        words.append(" ".join(passage.tokens[int(token)] for token in named).replace(" ##", ""))
    return Found(_restored(boxes[kept], picture, relative_to_picture=True), best[kept], classes, words, spans)


def decode_classes(
    logits: Floats, boxes: Floats, picture: Prepared, threshold: float, wanted: NDArray[np.bool_] | None
) -> Found:
    """Return the classes above `threshold` of each query, at most as many as there are queries, without unwanted ones.

    `logits` (queries, classes), `boxes` (queries, 4). Source: transformers' post-processing of RT-DETR.
    """
    check_finite(logits, boxes)
    scores = sigmoid(logits).ravel()
    best = np.argsort(-scores, kind="stable")[: len(logits)]
    best = best[scores[best] > threshold]
    queries, classes = np.divmod(best, logits.shape[1])
    found = Found(_restored(boxes[queries], picture, relative_to_picture=False), scores[best], classes.astype(np.int64))
    return found if wanted is None else found.take(np.flatnonzero(wanted[found.classes]))


def check_finite(*outputs: Floats) -> None:
    """Raise ModelError if a model gave NaN or infinity."""
    if not all(np.isfinite(output).all() for output in outputs):
        raise ModelError("gave numbers that are not finite", where="detector", hint="Set device.precision = 'f32'.")


def _restored(boxes: Floats, picture: Prepared, *, relative_to_picture: bool) -> Floats:
    """Return relative centres and sizes as corners in pixels of the picture."""
    height, width = picture.content if relative_to_picture else picture.canvas
    return picture.restored(corners(boxes) * np.array([width, height] * 2, np.float32))


def corners(boxes: Floats) -> Floats:
    """Return (n, 4) centre, width, height as left, top, right, bottom."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def sigmoid(values: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(np.float32(0), -values)).astype(np.float32)


def overlap(one: Floats, others: Floats) -> Floats:
    """Return the intersection over union of a box (4,) with others (n, 4)."""
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(np.clip(others[:, 2:] - others[:, :2], 0, None), axis=1)
    union = np.prod(np.clip(one[2:] - one[:2], 0, None)) + areas - both
    shares: Floats = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return shares


BLOCK = 64
"""Boxes whose overlaps with all others are computed at once."""


def suppress(found: Found, most: float, *, across: bool = False) -> Found:
    """Return what is left if, of two boxes of a class that overlap by more than `most`, the lower score goes.

    With `across`, whatever their classes are.
    """
    order = np.argsort(-found.scores, kind="stable")
    left, top, right, bottom = found.boxes[order].T
    areas = np.clip(right - left, 0, None) * np.clip(bottom - top, 0, None)
    classes = np.zeros_like(found.classes) if across else found.classes[order]
    stays = np.ones(len(order), np.bool_)
    for start in range(0, len(order), BLOCK):
        # All overlaps of some boxes at once: a call of `overlap` for each takes longer than a small detector.
        rows, rest = start + np.flatnonzero(stays[start : start + BLOCK])[:, None], slice(start, None)
        width = np.maximum(np.minimum(right[rest], right[rows]) - np.maximum(left[rest], left[rows]), 0)
        both = width * np.maximum(np.minimum(bottom[rest], bottom[rows]) - np.maximum(top[rest], top[rows]), 0)
        goes = (both > most * (areas[rest] + areas[rows] - both)) & (classes[rest] == classes[rows])
        for row, loses in zip(rows[:, 0].tolist(), goes, strict=True):
            if stays[row]:
                stays[row + 1 :] &= ~loses[row + 1 - start :]
    return found.take(order[stays])
