"""Low-rank compensation (LoRC): a thin branch beside quantized weights makes up for the largest part of their error.

Yao, Wu, Li, Youn, He: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
Compensation", 2023, arXiv:2303.08302. With W' the quantized weights and E = W - W' = U S V the singular value
decomposition of their error, of which the first `rank` are taken:

    U' = U_r sqrt(S_r),  V' = sqrt(S_r) V_r,  W ~ W' + U' V'

so that the layer becomes x W'^T + (x V'^T) U'^T. The factors are held in 8 bits, or in float16. Needs no data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report
from ovforge.model import ModelBundle
from ovforge_low_bit.integers import nearest
from ovforge_low_bit.layers import Layer, store
from ovforge_low_bit.options import LorcOptions
from ovforge_low_bit.rounding import storage
from ovforge_low_bit.stage import change_weights

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["LowRankCorrection", "factors"]

Array = NDArray[np.float32]


class LowRankCorrection:
    """Rounds weights to the nearest, and adds the branch."""

    def __init__(self, options: LorcOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Quantize each layer and give it a branch; asks for no calibration."""
        options = self.options

        def change(role: str, model: ov.Model, layers: Sequence[Layer], report: Report) -> str:
            for layer in layers:
                matrix = layer.matrix()
                integers = nearest(matrix, options.bits, options.symmetric, options.group_size)
                up, down = factors(matrix - integers.matrix(), options.rank)
                layer.set_weights(integers.output(layer.shape, layer.is_transposed, options.packed))
                self._add_branch(layer, up, down)
            return f"in {storage(options)}, with branches of rank {options.rank} in {options.factors}"

        return change_weights(bundle, options, keep, "lorc", change)

    def _add_branch(self, layer: Layer, up: Array, down: Array) -> None:
        """Add (x down^T) up^T to what the layer gives."""
        from openvino import opset13 as ops

        op = layer.op
        rank = len(down)
        readers = list(op.output(0).get_target_inputs())
        shape = [layer.width, rank] if layer.is_transposed else [rank, *layer.shape[1:]]
        first, how = self._held(down, shape, op, layer.is_transposed), op.get_attributes()
        if layer.is_convolution:
            places = [list(how[key]) for key in ("strides", "pads_begin", "pads_end", "dilations")]
            inner = ops.convolution(op.input_value(0), first, *places, auto_pad=how["auto_pad"])
            axes = [1] * (len(layer.shape) - 2)
            weights = self._held(up, [len(up), rank, *axes], op)
            outer = ops.convolution(inner, weights, axes, [0] * len(axes), [0] * len(axes), axes)
        else:
            inner = ops.matmul(op.input_value(0), first, how["transpose_a"], how["transpose_b"])
            outer = ops.matmul(inner, self._held(up, [len(up), rank], op), False, True)
        total = ops.add(op, outer)
        inner.set_friendly_name(f"{layer.name}/lorc_down")
        outer.set_friendly_name(f"{layer.name}/lorc_up")
        total.set_friendly_name(f"{layer.name}/lorc")
        if any(reader.get_node().get_type_name() == "Result" for reader in readers):
            total.output(0).set_names(op.output(0).get_names())
            op.output(0).set_names(set())
        for reader in readers:
            reader.replace_source_output(total.output(0))

    def _held(self, factor: Array, shape: Sequence[int], op: Any, transposed: bool = False) -> Any:
        """Return a factor as weights of `shape`, in the type of the layer's own."""
        from openvino import opset13 as ops

        wanted = op.input_value(1).get_element_type()
        if self.options.factors == "i8":
            held = nearest(factor, 8, True, -1).output(shape, transposed)
        else:
            laid = factor.T if transposed else factor
            held = store(laid.reshape(tuple(shape)).astype(np.float16)).output(0)
        return held if held.get_element_type() == wanted else ops.convert(held, wanted.get_type_name()).output(0)


def factors(error: Array, rank: int) -> tuple[Array, Array]:
    """Return U' (outputs, rank) and V' (rank, width), whose product is the best approximation of that rank.

    The singular vectors of the shorter side are the eigenvectors of E E^T, which is small; the others follow.
    """
    if error.shape[0] > error.shape[1]:
        up, down = factors(np.ascontiguousarray(error.T), rank)
        return np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    wide = error.astype(np.float64)
    squares, vectors = np.linalg.eigh(wide @ wide.T)
    first = vectors[:, ::-1][:, : min(rank, len(vectors))]
    # Each vector's sign is free; the greatest entry is made positive, so that equal models give equal bytes.
    first = first * np.sign(first[np.abs(first).argmax(axis=0), np.arange(first.shape[1])])
    roots = np.sqrt(np.sqrt(np.maximum(squares[::-1][: first.shape[1]], 0)))
    down = first.T @ wide / np.where(roots > 0, roots, 1)[:, None]
    return (first * roots).astype(np.float32), down.astype(np.float32)
