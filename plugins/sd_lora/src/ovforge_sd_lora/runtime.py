"""Adapters beside the weights: branches whose factors and strengths are variables, so that nothing is compiled again.

A linear layer or convolution y becomes y + B (s * (A x)), with A (rank, in), s (1, rank) and B (out, rank) held as
OpenVINO variables of open rank; several adapters stand one behind another along it, and zeros of rank 1 stand where
there is none. The form is the one that OpenVINO GenAI gives to its adapters (LoRASeparateTransform), and that the CPU
plugin fuses, or for linear layers one that is quicker in bfloat16. Biases and norms have a variable that is added to
them.

A kernel of several pixels is not a matrix product. A x is taken at each pixel for each tap, and a fixed convolution of
one-hot kernels then moves and adds the taps, with the layer's own strides, paddings and dilations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge_sd_lora import kinds
from ovforge_sd_lora.adapter import Module
from ovforge_sd_lora.fuse import after, difference
from ovforge_sd_lora.targets import BRANCH, Target, behind

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["attach", "module_factors", "strengths", "variables_of"]

Array = NDArray[np.float32]
_PREFIX = "lora/"


def variables_of(target: Target, what: str) -> dict[str, list[int]]:
    """Return the variables of a layer's place, id -> shape: of its `weight` or its `bias`."""
    name = f"{_PREFIX}{target.path}"
    if what == "bias":
        return {f"{name}.bias": [target.shape[0]]}
    if target.kind == "norm":
        return {f"{name}.weight": [target.shape[0]]}
    inner = target.shape[1]
    return {f"{name}.A": [-1, inner], f"{name}.s": [1, -1], f"{name}.B": [target.shape[0], -1]}


def attach(model: ov.Model, target: Target, what: str) -> dict[str, list[int]]:
    """Make a place for adapters at a layer, where it has none; return its variables."""
    shapes = variables_of(target, what)
    present = {variable.get_info().variable_id for variable in model.get_variables()}
    if set(shapes) <= present:
        return shapes
    taps = math.prod(target.shape[2:])
    reads = [_variable(model, name, shape, taps if name.endswith(".A") else 1) for name, shape in shapes.items()]
    if what == "bias":
        _attach_bias(target, reads[0])
    elif target.kind == "norm":
        _attach_norm(target, reads[0])
    else:
        for node in target.nodes:
            after(node, "Add", _branch(node, target, *reads), BRANCH)
    return shapes


def strengths(module: Module, strength: float, rank: int) -> Array:
    """Return what each rank is multiplied by: (1, rank). Those of relative kinds have alpha / rank in them."""
    return np.full((1, rank), strength * (1.0 if module.relative else module.factor), np.float32)


def module_factors(target: Target, module: Module, weight: Callable[[], Array]) -> tuple[Array, Array]:
    """Return (A, B) of what a module adds, before its factor: exact, of its own rank where it has one.

    Where it has none (a full difference; relative kinds), the smaller side of the layer is the rank, and one of the
    factors the identity. `weight` gives the layer's weight, and is called for relative kinds alone.
    """
    out, flat = target.shape[0], math.prod(target.shape[1:])
    if module.relative:
        whole = difference(weight(), module)
    else:
        tensors = module.tensors()
        found = kinds.factors(module.kind, tensors, min(out, flat) - 1)
        if found is not None:
            return _by_tap(found[0].reshape(-1, *target.shape[1:])), np.ascontiguousarray(module.own(found[1]))
        whole = module.own(kinds.delta(module.kind, tensors)).reshape(target.shape)
    if out <= flat or whole.ndim > 2:
        return _by_tap(whole), np.eye(out, dtype=np.float32)
    return np.eye(flat, dtype=np.float32), np.ascontiguousarray(whole)


def _by_tap(a: Array) -> Array:
    """Return (rank * taps, in) of factors (rank, in, height, width): the taps of a rank one behind another."""
    if a.ndim == 2:
        return np.ascontiguousarray(a)
    return np.ascontiguousarray(np.moveaxis(a, 1, -1).reshape(-1, a.shape[1]))


def _variable(model: ov.Model, name: str, shape: list[int], least: int) -> ov.Node:
    """Add a variable to the model; at first it is zero, of rank 1 (`least` numbers long where its shape is open).

    Not of rank 0: the CPU plugin leaves the result of such a product as it finds it in memory.
    """
    import openvino as ov
    from openvino import opset6
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
    variable = Variable(info)
    first = ops.constant(np.zeros([least if size == -1 else size for size in shape], np.float32))
    read = opset6.read_value(first, variable)
    first.set_friendly_name(f"{name}/first")
    read.set_friendly_name(name)
    write = opset6.assign(read, variable)
    write.set_friendly_name(f"{name}/kept")
    model.add_variables([variable])
    model.add_sinks([write])
    return read


def _branch(node: ov.Node, target: Target, a: ov.Node, s: ov.Node, b: ov.Node) -> ov.Node:
    """Return B (s * (A x)) of a layer's own input."""
    from openvino import opset13 as ops

    x = node.input_value(0)
    turned = target.kind == "linear" and node.get_attributes()["transpose_a"]  # it took in a transpose, as in Sana
    if target.kind == "linear" and (_is_input(x) or _is_quicker_apart(target, x)):
        # OpenVINO 2026.4's CPU plugin gives wrong numbers where it fuses a branch on an input of the model: NaN, now
        # and then, where several layers take one, as keys and values of cross-attention do; and beside compressed
        # weights, as soon as the input is given another tensor. It does not fuse this form.
        outer = ops.matmul(ops.multiply(b, s), ops.matmul(a, x, False, not turned), False, False)
        axes = list(range(len(x.get_partial_shape())))
        return ops.transpose(outer, [*axes[:-2], axes[-1], axes[-2]])
    if target.kind == "linear":
        return ops.matmul(ops.multiply(ops.matmul(x, a, turned, True), s), b, False, True)
    return _convolved_branch(node, target.shape, a, s, b)


@functools.cache
def _in_bfloat16() -> bool:
    """Say whether the processor computes in bfloat16, as it then does unless it is told not to."""
    from ovforge.model import core

    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _is_quicker_apart(target: Target, x: ov.Output) -> bool:
    """Say whether a branch is quicker if the CPU plugin does not fuse it.

    In bfloat16, a fused one takes twice as long, unless the other form has to turn an output wider than its input.
    """
    return len(x.get_partial_shape()) == 3 and target.shape[0] <= target.shape[1] and _in_bfloat16()


def _is_input(x: ov.Output) -> bool:
    """Say whether a layer takes an input of the model, as it is or in another precision or shape."""
    node = x.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Squeeze", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Parameter")


def _moves(node: ov.Node, shape: tuple[int, ...]) -> bool:
    """Say whether a convolution is more than a matrix product at each pixel."""
    attributes = node.get_attributes()
    return (
        shape[2:] != (1, 1)
        or set(attributes["strides"]) != {1}
        or any((*attributes["pads_begin"], *attributes["pads_end"]))
    )


def _convolved_branch(node: ov.Node, shape: tuple[int, ...], a: ov.Node, s: ov.Node, b: ov.Node) -> ov.Node:
    """Return the branch of a convolution; where it has a kernel, each tap of A x is moved, and added up.

    The matrices stand first in their products: the CPU plugin takes a second one for a weight of fixed shape.
    """
    from openvino import opset13 as ops

    def sizes(value: ov.Node, *axes: int) -> ov.Node:
        return ops.gather(ops.shape_of(value, "i64"), list(axes), ops.constant(np.int64(0)))

    x, kernel = node.input_value(0), shape[2:]
    inner = ops.matmul(a, ops.reshape(x, [0, 0, -1], True), False, False)
    sides = sizes(x, 2, 3)
    if _moves(node, shape):
        batch, taps = sizes(x, 0), ops.constant(np.array([math.prod(kernel)], np.int64))
        ranks = ops.divide(sizes(inner, 1), taps)
        # All ranks are one batch, of which each picture has a tap for a channel.
        stacked = ops.reshape(inner, ops.concat([ops.multiply(batch, ranks), taps, sides], 0), False)
        moved = _moved(stacked, node.get_attributes(), kernel)
        sides = sizes(moved, 2, 3)
        pixels = ops.reduce_prod(sides, ops.constant(np.array([0], np.int64)), True)
        inner = ops.reshape(moved, ops.concat([batch, ranks, pixels], 0), False)
    outer = ops.matmul(ops.multiply(b, s), inner, False, False)
    return ops.reshape(outer, ops.concat([sizes(outer, 0, 1), sides], 0), False)


def _moved(stacked: ov.Node, layer: Mapping[str, Any], kernel: tuple[int, ...]) -> ov.Node:
    """Return the sum of the channels, each moved to where a kernel's tap of that number would read it."""
    from openvino import opset13 as ops

    count = math.prod(kernel)
    return ops.convolution(
        stacked,
        ops.constant(np.eye(count, dtype=np.float32).reshape(1, count, *kernel)),
        *(layer[name] for name in ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")),
    )


def _attach_bias(target: Target, read: ov.Node) -> None:
    from openvino import opset13 as ops

    ports = target.bias_inputs()
    for port in ports:
        port.replace_source_output(_summed(port, read))
    if not ports:
        for node in target.nodes:
            if target.kind == "norm" and (weight := target.weight_inputs()):
                node = weight[0].get_node()
            shaped = ops.reshape(read, [-1, 1, 1], False) if target.kind == "conv" else read
            after(behind(node), "Add", shaped)


def _attach_norm(target: Target, read: ov.Node) -> None:
    from openvino import opset13 as ops

    ports = target.weight_inputs()
    for port in ports:
        port.replace_source_output(_summed(port, read))
    if not ports:
        for node in target.nodes:
            after(node, "Multiply", ops.add(read, ops.constant(np.float32(1))))


def _summed(port: ov.Input, read: ov.Node) -> ov.Output:
    """Return what an input takes plus a variable, in its shape."""
    from openvino import opset13 as ops

    source = port.get_source_output()
    shape = np.array(list(source.get_shape()), np.int64)
    total: ov.Output = ops.add(source, ops.reshape(read, ops.constant(shape), False)).output(0)
    return total
