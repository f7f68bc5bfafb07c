"""Values of some rows at later steps, from those at earlier ones: a Taylor expansion (TaylorSeer, Liu et al. 2025).

Derivatives are differences between the steps that are known, each divided by the steps between.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Forecast"]

Array = NDArray[np.floating]


class Forecast:
    """What is known of each row. Rows learn at steps of their own."""

    def __init__(self, order: int, values: Array) -> None:
        """Make room for values of the shape (rows, ...), up to the derivative `order`."""
        self._factors = np.zeros((order + 1, *values.shape), values.dtype)
        self._known = np.zeros(len(values), np.int64)
        self._last = np.zeros(len(values), np.int64)

    def learn(self, rows: NDArray[np.bool_], values: Array, step: int) -> None:
        """Take the values, (rows, ...), of the rows that a mask says, at a step after those that they learned at."""
        for row in np.flatnonzero(rows):
            new = values[row].copy()
            known = min(len(self._factors), int(self._known[row]) + 1)
            for order in range(known):
                before = self._factors[order, row].copy()
                self._factors[order, row] = new
                if order + 1 < known:
                    new = (new - before) / new.dtype.type(step - self._last[row])
            self._known[row], self._last[row] = known, step

    def since(self, step: int) -> NDArray[np.int64]:
        """Return how many steps ago each row learned, (rows,)."""
        return step - self._last

    def tell(self, step: int, out: Array) -> None:
        """Write the values of each row at a step; zeros for a row that learned nothing."""
        for row, since in enumerate(self.since(step)):
            np.copyto(out[row], self._factors[0, row])
            for order in range(1, int(self._known[row])):
                out[row] += self._factors[order, row] * out.dtype.type(since**order / math.factorial(order))
