"""Rounding weights by signed gradient descent (AutoRound), or to the nearest.

Cheng, Zhang, Shen, Cai, He, Lv, Liu: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", 2023, arXiv:2309.05516 (SignRound). With b bits and groups of weights W:

    s = (max(W) alpha - min(W) beta) / (2^b - 1),  z = round(-min(W) beta / s)
    W' = s (clip(round(W / s + z + V), 0, 2^b - 1) - z)

V, in [-0.5, 0.5], and alpha and beta, in [0, 1], go down the sign of the gradient of the squared error of the output,
|X W'^T - X W^T|^2; round passes gradients on as it gets them (straight-through). The step begins at 1 / iterations and
falls to 0 in a line; the best of all steps counts, the first of which is rounding to the nearest.

The paper takes the output of a block of layers; here it is each layer's own. Its error is that of its rows of weights
one by one, so that the best step is found for each row, and all of X that is needed is X^T X.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report
from ovforge.model import ModelBundle
from ovforge_low_bit.activations import statistics
from ovforge_low_bit.integers import Integers, divided, grid, limits, nearest, ranges, whole
from ovforge_low_bit.layers import Layer
from ovforge_low_bit.options import AutoRoundOptions, IntegerOptions
from ovforge_low_bit.stage import change_weights, each_layer, parted, recorded

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["AutoRound", "descend", "gradients", "signed_descent", "storage"]

Array = NDArray[np.float32]
Ends = tuple[Array, Array]
"""The least and the greatest weight of each group, (outputs, groups, 1)."""
Evaluate = Callable[[Sequence[Array]], tuple[Array, list[Array]]]
"""Parameters -> (error of each row, gradients)."""


class AutoRound:
    """Replaces weights by integers; the device multiplies, in the precision that it computes in."""

    def __init__(self, options: AutoRoundOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Round each layer's weights. Inputs are asked for only if there are iterations."""
        options = self.options

        def change(role: str, model: ov.Model, layers: Sequence[Layer], report: Report) -> str:
            if options.learns:
                narrow, others = parted(layers, options.max_width, role, report)
                self._learned(model, narrow, recorded(calibration, role, options.samples, "auto-round"))
            else:
                others = list(layers)
            for layer in others:
                self._set(layer, nearest(layer.matrix(), options.bits, options.symmetric, options.group_size))
            how = f"by signed descent, {options.iterations} steps" if options.iterations else "to the nearest"
            return f"in {storage(options)}, rounded {how}"

        return change_weights(bundle, options, keep, "auto-round", change)

    def _learned(self, model: ov.Model, layers: Sequence[Layer], records: Sequence[Mapping[str, Any]]) -> None:
        options = self.options
        before = model.clone()  # shares the weights; the inputs of all layers are those of the model as it was
        sums = statistics(before, layers, records, "gram", limit=options.rows, memory=options.memory * 2**20)
        for layer, gram in each_layer(sums):
            self._set(
                layer,
                signed_descent(
                    layer.matrix(), gram, options.bits, options.symmetric, options.group_size,
                    options.iterations, options.learning_rate, options.tune_range,
                ),
            )  # fmt: skip

    def _set(self, layer: Layer, integers: Integers) -> None:
        layer.set_weights(integers.output(layer.shape, layer.is_transposed, self.options.packed))


def storage(options: IntegerOptions) -> str:
    """Say in how many bits weights lie, if it is not the number asked for."""
    return "3 bits (held in 4)" if options.bits == 3 and not options.packed else f"{options.bits} bits"


def signed_descent(
    matrix: Array,
    gram: Array,
    bits: int,
    symmetric: bool,
    group_size: int,
    iterations: int,
    learning_rate: float | None = None,
    tune_range: bool = True,
) -> Integers:
    """Return `matrix` (outputs, width) in integers, for inputs X with X^T X = `gram` (width, width)."""
    weights = divided(matrix, group_size)
    ends = ranges(weights)
    ones = np.ones((*weights.shape[:2], 1), np.float32)
    start = [np.zeros_like(weights), ones, ones]
    bounds = [(-0.5, 0.5), (0.0, 1.0) if tune_range else (1.0, 1.0), (0.0, 1.0) if tune_range else (1.0, 1.0)]
    shift, alpha, beta = descend(
        lambda now: gradients(weights, ends, gram, now[0], now[1], now[2], bits, symmetric),
        start, bounds, iterations, learning_rate or 1 / iterations,
    )  # fmt: skip
    codes, scale, zero, _ = _rounded(weights, ends, shift, alpha, beta, bits, symmetric)
    return whole(codes, scale, zero, bits, symmetric)


def descend(
    evaluate: Evaluate,
    start: Sequence[Array],
    bounds: Sequence[tuple[float, float]],
    iterations: int,
    learning_rate: float,
) -> list[Array]:
    """Return the best parameters that signed gradient descent comes by, for each row (the first axis) by itself."""
    now = [parameter.copy() for parameter in start]
    best, least = [parameter.copy() for parameter in start], None
    for step in range(iterations + 1):
        errors, slopes = evaluate(now)
        better = np.ones(len(errors), bool) if least is None else errors < least
        least = errors if least is None else np.where(better, errors, least)
        for kept, parameter in zip(best, now, strict=True):
            kept[better] = parameter[better]
        rate = np.float32(learning_rate * (1 - step / max(iterations, 1)))
        for parameter, slope, (low, high) in zip(now, slopes, bounds, strict=True):
            np.clip(parameter - rate * np.sign(slope), low, high, out=parameter)
    return best


def gradients(
    weights: Array, ends: Ends, gram: Array, shift: Array, alpha: Array, beta: Array, bits: int, symmetric: bool
) -> tuple[Array, list[Array]]:
    """Return the error of each row, (outputs,), and its gradients by V, alpha and beta, of their shapes.

    `weights` and V are (outputs, groups, size), alpha and beta (outputs, groups, 1). A symmetric grid has one end to
    its range, which alpha shrinks.
    """
    codes, scale, zero, inside = _rounded(weights, ends, shift, alpha, beta, bits, symmetric)
    steps = codes - zero
    error = steps * scale - weights
    flat = error.reshape(len(error), -1)
    product = flat @ gram
    slope = np.float32(2) * product.reshape(error.shape)
    by_shift = slope * scale * inside
    # d W'/d s is q - z where q is clipped, and less W / s elsewhere: the error, in steps, with V's part in it.
    by_scale = (slope * np.where(inside, error / scale, steps)).sum(-1, keepdims=True)
    least, greatest = ends
    errors = np.einsum("ij,ij->i", product, flat)
    if symmetric:
        largest = np.where(-least * beta >= greatest * alpha, least, greatest)
        by_end = by_scale * -largest / np.float32(2 ** (bits - 1))
        return errors, [by_shift, by_end, by_end]
    most = np.float32(2**bits - 1)
    by_zero = -(slope * scale * ~inside).sum(-1, keepdims=True)
    # z = round(-least beta / s), straight through the rounding: both ends move s, and s moves z.
    by_scale = by_scale + by_zero * least * beta / scale**2
    by_alpha = by_scale * greatest / most
    by_beta = by_scale * -least / most - by_zero * least / scale
    return errors, [by_shift, by_alpha, by_beta]


def _rounded(
    weights: Array, ends: Ends, shift: Array, alpha: Array, beta: Array, bits: int, symmetric: bool
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Return integers, scale, zero point (all as float32), and which integers were not clipped."""
    least, greatest = ends
    scale, zero = grid(least * beta, greatest * alpha, bits, symmetric)
    low, high = limits(bits, symmetric)
    raw = np.round(weights / scale + zero + shift)
    return np.clip(raw, low, high), scale, zero, (raw >= low) & (raw <= high)
