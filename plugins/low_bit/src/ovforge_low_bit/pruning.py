"""Pruning by weights and activations (Wanda).

Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695.
The score of a weight is its size times the norm of the input that it multiplies, over all rows of the inputs seen:

    S_ij = |W_ij| |X_j|_2

and in each output (row i) by itself the least of them become 0: a share of the row, or two of each four neighbours
(2:4). No other weight changes. Neighbours of a convolution are input channels at one place of its kernel, as sparse
hardware takes them. Weights stay in their type, zeros among them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report
from ovforge.model import ModelBundle
from ovforge_low_bit.activations import statistics
from ovforge_low_bit.layers import Layer
from ovforge_low_bit.options import WandaOptions
from ovforge_low_bit.stage import change_weights, each_layer, recorded

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Wanda", "scores", "smallest", "two_of_four", "zero"]

Array = NDArray[np.float32]
_HALF = 0.5


class Wanda:
    """Zeroes weights."""

    def __init__(self, options: WandaOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Prune each layer's weights by the inputs that it sees in the unpruned model."""
        options = self.options

        def change(role: str, model: ov.Model, layers: Sequence[Layer], report: Report) -> str:
            records = recorded(calibration, role, options.samples, "wanda")
            total = zeros = 0
            sums = statistics(model.clone(), layers, records, "squares", limit=options.rows)
            for layer, squares in each_layer(sums):
                pruned = self._pruned(layer, squares)
                total, zeros = total + pruned.size, zeros + int(pruned.sum())
                zero(layer, pruned)
            kind = "2 of 4" if options.pattern == "2:4" else "a share of each row"
            report.notes.append(f"{role}: {zeros} of {total} weights are 0; they are stored like the others")
            return f"pruned, {kind}"

        return change_weights(bundle, options, keep, "wanda", change, self._unfit)

    def _unfit(self, layer: Layer) -> str | None:
        inputs = layer.shape[1] if layer.is_convolution else layer.width
        odd = self.options.pattern == "2:4" and inputs % 4
        return f"its {inputs} inputs are not a multiple of 4, which 2:4 needs" if odd else None

    def _pruned(self, layer: Layer, squares: Array) -> NDArray[np.bool_]:
        """Return which weights become 0, (outputs, width)."""
        score = scores(layer.matrix(), squares)
        if self.options.pattern == "unstructured":
            return smallest(score, self.options.share or _HALF)
        if not layer.is_convolution:
            return two_of_four(score)
        # Channels last: the neighbours of a row are then channels at one place.
        last = np.moveaxis(score.reshape(layer.shape), 1, -1)
        pruned = two_of_four(last.reshape(len(last), -1)).reshape(last.shape)
        return np.moveaxis(pruned, -1, 1).reshape(score.shape)


def scores(matrix: Array, squares: Array) -> Array:
    """Return |W_ij| |X_j|, (outputs, width), from sums of squares of each input, (width,)."""
    return np.abs(matrix) * np.sqrt(squares)


def smallest(score: Array, share: float) -> NDArray[np.bool_]:
    """Return where the least `share` of each row is; of equal ones the first."""
    count = int(score.shape[1] * share)
    pruned = np.zeros(score.shape, bool)
    np.put_along_axis(pruned, np.argsort(score, axis=1, kind="stable")[:, :count], True, axis=1)
    return pruned


def two_of_four(score: Array) -> NDArray[np.bool_]:
    """Return where the two least of each four neighbours of a row are."""
    return smallest(score.reshape(-1, 4), _HALF).reshape(score.shape)


def zero(layer: Layer, pruned: NDArray[np.bool_]) -> None:
    """Give the layer a copy of its weights with zeros; all types of real numbers are 0 where their bits are."""
    import openvino as ov
    from openvino import opset13 as ops

    constant = layer.constant
    mask = pruned.T if layer.is_transposed else pruned.reshape(layer.shape)
    tensor = ov.Tensor(constant.get_element_type(), ov.Shape(list(layer.shape)))
    tensor.data[:] = constant.data
    tensor.data.view(f"u{constant.get_element_type().size}")[mask] = 0
    pruned_constant = ops.constant(tensor).output(0)
    for reader in list(constant.output(0).get_target_inputs()):  # a conversion to float32 stays as it is
        reader.replace_source_output(pruned_constant)
