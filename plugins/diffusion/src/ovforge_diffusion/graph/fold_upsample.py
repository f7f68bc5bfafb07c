"""Fold up-sampling into the convolution after it.

A picture doubled by its nearest neighbours, then convolved 3x3, is a transposed convolution 4x4 of stride 2: each value
of the small picture reaches the same 4x4 values of the large one, and what it adds to each is a sum of the kernel's
weights. That takes 16 multiplications where there were 36, and the large picture between is never made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovforge.contracts import Report
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.nodes import operands, weights_of

__all__ = ["FoldUpsample", "folded"]

ROLES = ("unet", "vae_decoder")

_SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
"""Row m: which of the kernel's three weights a value adds to its m-th neighbour in the doubled row."""


def folded(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the transposed convolution's kernel (in, out, 4, 4) for a convolution's (out, in, 3, 3)."""
    spread: NDArray[np.float32] = np.einsum("ma,nb,oiab->iomn", _SPREAD, _SPREAD, kernel, optimize=True)
    return np.ascontiguousarray(spread, np.float32)


class FoldUpsample:
    """Changes UNets and decoders; equal to rounding, so that it has no options.

    A UNet that takes every size makes what a skip connection has, which may be one less than the double: it is left as
    it is, for only fixed shapes tell.
    """

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Fold what can be folded, and say what cannot."""
        report = Report()
        for role in ROLES:
            if role not in bundle.models:
                continue
            model = bundle.models[role]
            pairs = [pair for node in model.get_ordered_ops() for pair in _pairs(node)]
            open_sizes = sum(not _doubles(upsample) for upsample, _ in pairs)
            pairs = [pair for pair in pairs if _doubles(pair[0])]
            kernels = [weights_of(operands(convolution)[1]) for _, convolution in pairs]
            for (upsample, convolution), kernel in zip(pairs, kernels, strict=True):
                if kernel is not None:
                    _fold(upsample, convolution, kernel)
            changing = sum(kernel is None for kernel in kernels)
            if changing < len(pairs):
                model.validate_nodes_and_infer_types()
                bundle.models[role] = model
                report.roles += (role,)
                report.applied.append(f"{role}: {len(pairs) - changing} up-sampling convolutions folded")
            if changing:
                report.notes.append(f"{role}: {changing} stay as they are: their weights are compressed or adjustable")
            if open_sizes:
                report.notes.append(f"{role}: {open_sizes} stay as they are: for some sizes they do not double")
        if not report.applied and not report.notes:
            report.notes.append("nothing to do: no nearest-neighbour up-sampling before a 3x3 convolution")
        return report


def _pairs(node: ov.Node) -> list[tuple[ov.Node, ov.Node]]:
    """Return (up-sampling, convolution) for each 3x3 convolution of what a nearest-neighbour up-sampling makes."""
    if node.get_type_name() != "Interpolate" or not _is_nearest(node):
        return []
    users = [port.get_node() for port in node.output(0).get_target_inputs()]
    return [(node, user) for user in users if user.get_type_name() == "Convolution" and _keeps_size(user)]


def _is_nearest(node: ov.Node) -> bool:
    """Say whether an Interpolate takes the value at floor(place / scale) along the last two of four dimensions."""
    attributes = node.get_attributes()
    if node.get_type_info().version_id not in ("opset4", "opset11") or len(node.inputs()) < _axes_index(node) + 1:
        return False
    axes = weights_of(operands(node)[_axes_index(node)])
    return (
        node.get_output_partial_shape(0).rank == 4
        and attributes["mode"] == "nearest"
        and attributes["coordinate_transformation_mode"] == "asymmetric"
        and attributes["nearest_mode"] == "floor"
        and not any((*attributes["pads_begin"], *attributes["pads_end"]))
        and axes is not None
        and axes.tolist() == [2, 3]
    )


def _axes_index(node: ov.Node) -> int:
    """Version 4 takes sizes, scales and axes; version 11 takes one of sizes and scales."""
    return 3 if node.get_type_info().version_id == "opset4" else 2


def _doubles(node: ov.Node) -> bool:
    """Say whether an Interpolate is known to double both sides."""
    if node.get_attributes()["shape_calculation_mode"] == "scales":
        scales = weights_of(operands(node)[_axes_index(node) - 1])
        return scales is not None and scales.tolist() == [2, 2]
    before, after = (list(port.get_partial_shape())[2:] for port in (node.input(0), node.output(0)))
    return all(
        a.is_static and b.is_static and b.get_length() == 2 * a.get_length() for a, b in zip(before, after, strict=True)
    )


def _keeps_size(convolution: ov.Node) -> bool:
    attributes, kernel = convolution.get_attributes(), convolution.input(1).get_partial_shape()
    return (
        kernel.is_static
        and list(kernel.to_shape())[2:] == [3, 3]
        and all(list(attributes[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    )


def _fold(upsample: ov.Node, convolution: ov.Node, kernel: NDArray[Any]) -> None:
    # The sums stay in float32: rounded to float16 they would add an error as large as that of the weights themselves.
    filters = ops.constant(folded(kernel.astype(np.float32, copy=False)))
    made = ops.convolution_backprop_data(upsample.input_value(0), filters, [2, 2], None, [1, 1], [1, 1], [1, 1])
    made.set_friendly_name(convolution.get_friendly_name())
    for user in convolution.output(0).get_target_inputs():
        user.replace_source_output(made.output(0))
