"""Which box is whose: overlaps of boxes, and the assignment that is best in all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

__all__ = ["Pairs", "agreement", "assign", "inside", "middles", "overlaps"]

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
Pairs = tuple[Numbers, Numbers, Numbers, Numbers]
"""Rows and columns that belong together, and the rows and the columns that are left."""


def overlaps(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> Floats:
    """Return the intersection over union of boxes (n, 4) with others (m, 4), as (n, m)."""
    both = _shared(ours, theirs)
    union = _areas(ours)[:, None] + _areas(theirs)[None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def inside(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> Floats:
    """Return the share of boxes (n, 4) that lies in others (m, 4), as (n, m)."""
    both = _shared(ours, theirs)
    areas = np.broadcast_to(_areas(ours)[:, None], both.shape)
    return np.divide(both, areas, out=np.zeros_like(both), where=areas > 0)


def middles(boxes: NDArray[np.floating]) -> Floats:
    """Return the middles (n, 2) of boxes (n, 4)."""
    boxes = np.asarray(boxes, np.float64)
    return (boxes[:, :2] + boxes[:, 2:]) / 2


STILL = 0.1
"""Share of a thing's sides that it moves by before it has a direction."""


def agreement(past: Floats, last: NDArray[np.floating], theirs: NDArray[np.floating]) -> Floats:
    """Return how well boxes (m, 4) lie in the direction that things moved in, -1/2..1/2, as (n, m).

    `past` (n, k, 2) are the middles of the things' earlier boxes, the oldest first, `last` (n, 4) their last ones. What
    has hardly moved has no direction: it counts in proportion. Source: the momentum of OC-SORT (Cao et al. 2023).
    """
    now, side = middles(last), np.maximum((np.asarray(last)[:, 2:] - np.asarray(last)[:, :2]).mean(1), 1e-9)
    moved, ahead = now - past[:, 0], middles(theirs)[None] - now[:, None]
    long, far = np.linalg.norm(moved, axis=1)[:, None], np.linalg.norm(ahead, axis=2)
    cosine = np.divide((ahead * moved[:, None]).sum(2), long * far, out=np.zeros_like(far), where=long * far > 0)
    counts = np.clip(long / (STILL * side[:, None]), 0, 1) * np.clip(far / (STILL * side[:, None]), 0, 1)
    agreed: Floats = counts * (0.5 - np.arccos(np.clip(cosine, -1, 1)) / np.pi)
    return agreed


def _shared(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> Floats:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    both: Floats = np.clip(high - low, 0, None).prod(axis=2)
    return both


def _areas(boxes: NDArray[np.floating]) -> Floats:
    sides: Floats = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).astype(np.float64).prod(axis=1)
    return sides


def assign(likeness: Floats, least: float, able: NDArray[np.bool_] | None = None) -> Pairs:
    """Return the pairs of the greatest summed likeness (n, m), each of `least` or more, and what is left.

    Source: the assignment problem, by scipy. `able` (n, m) says which pairs may be.
    """
    allowed = likeness >= least
    if able is not None:
        allowed &= able
    rows, columns = linear_sum_assignment(np.where(allowed, likeness, -1e6), maximize=True)
    kept = allowed[rows, columns]
    rows, columns = rows[kept].astype(np.int64), columns[kept].astype(np.int64)
    left = [np.setdiff1d(np.arange(n), used) for n, used in zip(likeness.shape, (rows, columns), strict=True)]
    return rows, columns, left[0], left[1]
