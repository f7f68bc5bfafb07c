"""Loops inside a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovforge_diffusion.single_graph.joining import constant

__all__ = ["Body"]


class Body:
    """The body of a loop while it is built: its parameters, and what each of them takes."""

    def __init__(self) -> None:
        self._state: ov.Node | None = None
        self._sliced: list[tuple[ov.Node, ov.Output]] = []
        self._invariant: list[tuple[ov.Node, ov.Output]] = []

    def parameter(self, value: ov.Output) -> ov.Output:
        """Return the body's own form of what the loop hands on."""
        self._state = ops.parameter(value.get_partial_shape(), value.get_element_type())
        return self._state.output(0)

    def sliced(self, table: NDArray[np.generic]) -> ov.Output:
        """Return the row, (1, ...), of a table that belongs to an iteration."""
        return self.sliced_value(constant(table))

    def sliced_value(self, value: ov.Output) -> ov.Output:
        """Return the row of a value that belongs to an iteration."""
        shape = value.get_partial_shape()
        parameter = ops.parameter(ov.PartialShape([ov.Dimension(1), *list(shape)[1:]]), value.get_element_type())
        self._sliced.append((parameter, value))
        return parameter.output(0)

    def invariant(self, value: ov.Output) -> ov.Output:
        """Return a value that is the same in all iterations."""
        parameter = ops.parameter(value.get_partial_shape(), value.get_element_type())
        self._invariant.append((parameter, value))
        return parameter.output(0)

    def run(self, times: int, first: ov.Output, following: ov.Output) -> ov.Output:
        """Return the state after so many iterations, from its first value and the body's next one."""
        loop = self._loop(constant(times), [self._state], following)
        loop.set_merged_input(self._state, first, following)
        return loop.get_iter_value(following, -1)

    def rows(self, times: ov.Output, row: ov.Output) -> ov.Output:
        """Return the rows, (1, ...), of so many iterations, int64 (1,), one below the other."""
        return self._loop(times, [], row).get_concatenated_slices(row, 0, 1, 1, -1, 0)

    def _loop(self, times: ov.Output, state: Sequence[ov.Node | None], value: ov.Output) -> ov.Node:
        goes_on = constant(np.array(True))
        parameters = [*state, *(node for node, _ in (*self._sliced, *self._invariant))]
        loop = ops.loop(times, constant(np.array(True)))
        loop.set_function(ov.Model([ops.result(goes_on), ops.result(value)], parameters, "step"))
        loop.set_special_body_ports([-1, 0])
        for parameter, given in self._sliced:
            loop.set_sliced_input(parameter, given, 0, 1, 1, -1, 0)
        for parameter, given in self._invariant:
            loop.set_invariant_input(parameter, given)
        return loop
