"""Putting models together: a copy of a model's graph takes its inputs from another graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovforge.errors import InputError, ModelError
from ovforge_diffusion.graph.nodes import port_named

__all__ = ["Joined", "constant", "converted", "join", "longer", "part", "reshaped", "rows_of", "shape_of", "zeros"]


@dataclass(frozen=True)
class Joined:
    """The outputs of a model's copy inside another graph, in the model's order."""

    role: str
    ports: Sequence[ov.Output]
    values: Sequence[ov.Output]

    @property
    def names(self) -> set[str]:
        """All names of the model's outputs."""
        return {name for port in self.ports for name in port.names}

    def named(self, name: str) -> ov.Output:
        """Return an output by its name. Raises ModelError if there is none."""
        port = port_named(self.ports, name, self.role)
        return self.values[list(self.ports).index(port)]


def join(model: ov.Model, role: str, inputs: Mapping[str, ov.Output], *, settle: bool = False) -> Joined:
    """Copy a model's graph so that it takes its inputs from `inputs`, by name; types are converted.

    The copy has the model's own constants. With `settle`, states keep the values that they begin with. Raises
    ModelError if the model takes something else besides, or keeps a state, InputError if it was converted for other
    shapes.
    """
    if model.get_variables() and not settle:
        raise ModelError(
            "it keeps a state that is set while it runs, which a graph of several steps cannot hand on",
            where=role,
            hint='Fuse what can be switched, for a LoRA by mode = "fuse".',
        )
    copy = model.clone()
    for node in copy.get_ops() if settle else ():
        if node.get_type_name() == "ReadValue":
            _replace_users(node.output(0), node.input_value(0))
    values = [port.get_node().input_value(0) for port in copy.outputs]
    for parameter in copy.get_parameters():
        _fill(parameter, role, inputs)
    for value in values:  # they would be names in the whole graph, where several models have the same ones
        value.get_tensor().set_names(set())
    return Joined(role, model.outputs, values)


def _fill(parameter: ov.Node, role: str, inputs: Mapping[str, ov.Output]) -> None:
    """Let those that use an input use another value."""
    port = parameter.output(0)
    name = next((name for name in port.names if name in inputs), None)
    if name is None:
        raise ModelError(
            f"it has the input {' or '.join(sorted(port.names)) or '(without a name)'}, which a single graph does not "
            "fill", where=role, hint=f"Expected are: {', '.join(sorted(inputs))}.",
        )  # fmt: skip
    value = inputs[name]
    if not port.get_partial_shape().compatible(value.get_partial_shape()):
        raise InputError(
            f"the model takes {name} of shape {port.get_partial_shape()}, not {value.get_partial_shape()}",
            where=role,
            hint="It was converted for a fixed size: use that size, or convert it with dynamic shapes.",
        )
    _replace_users(port, converted(value, port.get_element_type()))


def _replace_users(port: ov.Output, value: ov.Output) -> None:
    for user in port.get_target_inputs():
        user.replace_source_output(value)


def constant(value: NDArray[Any] | Sequence[int] | int) -> ov.Output:
    """Return a constant; whole numbers without an array are int64."""
    return ops.constant(value if isinstance(value, np.ndarray) else np.array(value, np.int64)).output(0)


def converted(value: ov.Output, kind: ov.Type) -> ov.Output:
    """Return a value in an element type."""
    return value if value.get_element_type() == kind else ops.convert(value, kind.get_type_name()).output(0)


def reshaped(value: ov.Output, shape: Sequence[int]) -> ov.Output:
    """Return a value in a shape, in which -1 is what is left."""
    return ops.reshape(value, constant(list(shape)), False).output(0)


def part(value: ov.Output, begin: int, end: int, axis: int) -> ov.Output:
    """Return what lies from `begin` to before `end` along an axis; negative numbers count from the end."""
    return ops.slice(value, constant([begin]), constant([end]), constant([1]), constant([axis])).output(0)


def longer(value: ov.Output, missing: int) -> ov.Output:
    """Return a value with so many zeros behind it along the second axis."""
    if not missing:
        return value
    rest = [rows_of(value), constant([missing])]
    if (rank := len(value.get_partial_shape())) > 2:
        rest.append(part(shape_of(value), 2, rank, 0))
    filling = converted(zeros(ops.concat(rest, 0).output(0)), value.get_element_type())
    return ops.concat([value, filling], 1).output(0)


def rows_of(value: ov.Output) -> ov.Output:
    """Return the length of a value's first axis, int64 (1,)."""
    first = value.get_partial_shape()[0]
    if first.is_static:
        return constant([first.get_length()])
    return part(shape_of(value), 0, 1, 0)


def zeros(shape: ov.Output) -> ov.Output:
    """Return float32 zeros of a shape, int64 (rank,)."""
    return ops.broadcast(constant(np.zeros((), np.float32)), shape).output(0)


def shape_of(value: ov.Output) -> ov.Output:
    """Return a value's shape, int64 (rank,)."""
    return ops.shape_of(value, "i64").output(0)
