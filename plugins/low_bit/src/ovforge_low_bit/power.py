"""Codebooks of powers (PowerQuant, NUPES): steps that are small near 0, where most weights are.

Yvinec, Dapogny, Cord, Bailly: "PowerQuant: Automorphism Search for Non-Uniform Quantization", 2023, arXiv:2301.09858.
With c = 2^(bits-1) - 1, an exponent a in (0, 1], and s the largest size of a weight in its group:

    q = round(c sign(W) |W / s|^a),  W' = s sign(q) |q / c|^(1/a)

One a is searched for a model, the one of the least sum over its layers of |W - W'|_2: rounding to the nearest is a = 1.

Yvinec, Dapogny, Bailly: "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", 2023,
arXiv:2308.05600: an exponent for each layer, by the error of its output, and rounding learned on top of it (`search =
"layer"`, `iterations`). NUPES finds both by gradient descent with soft rounding; here the exponent is searched on a
line as before, and rounding goes down the sign of the gradient (see `rounding`), for which it only matters that codes
rise with weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report
from ovforge.model import ModelBundle
from ovforge_low_bit.activations import statistics
from ovforge_low_bit.integers import constant_of, divided, laid, scale_type, shaped, stored
from ovforge_low_bit.layers import Layer, store
from ovforge_low_bit.options import PowerQuantOptions
from ovforge_low_bit.rounding import descend
from ovforge_low_bit.stage import change_weights, each_layer, parted, recorded

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["PowerQuant", "Powers", "learned", "minimum", "nearest_powers", "table_of"]

Array = NDArray[np.float32]
_GOLDEN = (5**0.5 - 1) / 2
_COARSE = np.linspace(0.2, 1.0, 9)


@dataclass(frozen=True)
class Powers:
    """A matrix in codes (outputs, groups, size) from -c to c, as floats, with scales (outputs, groups, 1)."""

    codes: Array
    scale: Array
    exponent: float
    bits: int

    def matrix(self) -> Array:
        """Return the weights that they stand for, (outputs, width)."""
        return _decoded(self.codes, self.scale, self.exponent, self.bits).reshape(len(self.codes), -1)

    def output(self, shape: Sequence[int], transposed: bool = False) -> Any:
        """Return the weights in `shape`: a Gather of a table of 2^bits float16, by u4 codes, times the scales."""
        from openvino import opset13 as ops

        kind = scale_type(self.scale)
        top = 2 ** (self.bits - 1) - 1
        codes = constant_of(laid((self.codes + top).astype(np.uint8), transposed), "u4")
        table = store(table_of(self.exponent, self.bits).astype(kind))
        # With indices of 32 bits the CPU makes float32 of it when it compiles; with others it keeps the indices, too.
        weights = ops.gather(table, ops.convert(codes, "i32"), store(np.array(0, np.int64)))
        return shaped(ops.multiply(weights, store(laid(self.scale.astype(kind), transposed))), shape)


class PowerQuant:
    """Replaces weights by codes of a table."""

    def __init__(self, options: PowerQuantOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Find exponents and quantize each layer. Inputs are asked for by search = "layer" and by iterations."""
        options = self.options

        def change(role: str, model: ov.Model, layers: Sequence[Layer], report: Report) -> str:
            exponent = options.exponent
            if exponent is None and options.search == "model":
                exponent = self._least(layers)
            used: list[float] = []
            others = list(layers)
            if options.learns:
                narrow, others = parted(layers, options.max_width, role, report)
                records = recorded(calibration, role, options.samples, "power-quant")
                used += self._with_data(model, narrow, exponent, records)
            for layer in others:
                used.append(self._least([layer]) if exponent is None else exponent)
                self._set(layer, nearest_powers(layer.matrix(), used[-1], options.bits, options.group_size))
            span = f"{min(used):.3f}" if min(used) == max(used) else f"{min(used):.3f} to {max(used):.3f}"
            held = " (held in 4)" if options.bits == 3 else ""
            return f"in {options.bits} bits{held}, codebook of powers, exponent {span}"

        return change_weights(bundle, options, keep, "power-quant", change)

    def _least(self, layers: Sequence[Layer]) -> float:
        """Return the one exponent of the least sum of these layers' errors."""
        options = self.options

        def error(exponent: float) -> float:
            total = 0.0
            for layer in layers:
                matrix = layer.matrix()
                powers = nearest_powers(matrix, exponent, options.bits, options.group_size)
                total += float(np.linalg.norm(matrix - powers.matrix()))
            return total

        return minimum(error)

    def _with_data(
        self, model: ov.Model, layers: Sequence[Layer], exponent: float | None, records: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Quantize by the error of outputs; return the exponents used."""
        options = self.options
        used = []
        sums = statistics(model.clone(), layers, records, "gram", limit=options.rows, memory=options.memory * 2**20)
        for layer, gram in each_layer(sums):
            matrix = layer.matrix()

            def error(candidate: float, matrix: Array = matrix, gram: Array = gram) -> float:
                powers = nearest_powers(matrix, candidate, options.bits, options.group_size)
                difference = matrix - powers.matrix()
                return float(np.vdot(difference @ gram, difference))

            own = minimum(error) if exponent is None else exponent
            used.append(own)
            if options.iterations:
                powers = learned(matrix, gram, own, options.bits, options.group_size, options.iterations)
            else:
                powers = nearest_powers(matrix, own, options.bits, options.group_size)
            self._set(layer, powers)
        return used

    def _set(self, layer: Layer, powers: Powers) -> None:
        layer.set_weights(powers.output(layer.shape, layer.is_transposed))


def table_of(exponent: float, bits: int) -> Array:
    """Return sign(q) |q / c|^(1/a) of each code, float16 numbers, (2^bits,); the last is not used."""
    top = 2 ** (bits - 1) - 1
    codes = np.arange(-top, top + 2, dtype=np.float64) / top
    table = np.sign(codes) * np.abs(codes) ** (1 / exponent)
    rounded: Array = table.astype(np.float16).astype(np.float32)
    return rounded


def nearest_powers(matrix: Array, exponent: float, bits: int, group_size: int) -> Powers:
    """Return `matrix` (outputs, width) rounded to the nearest in the domain of powers, as the paper does."""
    weights = divided(matrix, group_size)
    scale = _scale(weights)
    return Powers(np.round(_raised(weights, scale, exponent, bits)), scale, exponent, bits)


def learned(matrix: Array, gram: Array, exponent: float, bits: int, group_size: int, iterations: int) -> Powers:
    """Return `matrix` in codes whose rounding was learned, for inputs X with X^T X = `gram`."""
    weights = divided(matrix, group_size)
    scale = _scale(weights)
    raised = _raised(weights, scale, exponent, bits)
    top = 2 ** (bits - 1) - 1

    def evaluate(now: Sequence[Array]) -> tuple[Array, list[Array]]:
        raw = np.round(raised + now[0])
        codes = np.clip(raw, -top, top)
        error = (_decoded(codes, scale, exponent, bits) - weights).reshape(len(matrix), -1)
        product = error @ gram
        # Weights rise with codes, so that the gradient by V has the sign of that by the weight, where nothing is
        # clipped.
        return np.einsum("ij,ij->i", product, error), [product.reshape(raw.shape) * (np.abs(raw) <= top)]

    (shift,) = descend(evaluate, [np.zeros_like(weights)], [(-0.5, 0.5)], iterations, 1 / iterations)
    return Powers(np.clip(np.round(raised + shift), -top, top), scale, exponent, bits)


def minimum(function: Callable[[float], float]) -> float:
    """Return where a function on [0.2, 1] is least: the best of nine points, then golden sections beside it, to 0.005.

    The paper shows that the error is convex near its minimum; rounding makes it rough elsewhere.
    """
    values = [function(float(point)) for point in _COARSE]
    best = int(np.argmin(values))
    low, high = float(_COARSE[max(best - 1, 0)]), float(_COARSE[min(best + 1, len(_COARSE) - 1)])
    seen = {float(_COARSE[best]): values[best]}
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    seen[left], seen[right] = function(left), function(right)
    while high - low > 0.005:
        if seen[left] <= seen[right]:
            high, right, left = right, left, right - _GOLDEN * (right - low)
            seen[left] = function(left)
        else:
            low, left, right = left, right, left + _GOLDEN * (high - left)
            seen[right] = function(right)
    return min(seen, key=seen.__getitem__)


def _scale(weights: Array) -> Array:
    largest = np.abs(weights).max(-1, keepdims=True)
    return stored(np.where(largest < np.float32(1e-12), 1, largest))


def _raised(weights: Array, scale: Array, exponent: float, bits: int) -> Array:
    """Return c sign(W) |W / s|^a; a scale that was rounded down in float16 could bring it a hair over c."""
    top = np.float32(2 ** (bits - 1) - 1)
    ratio = np.minimum(np.abs(weights / scale), 1)
    raised: Array = top * np.sign(weights) * ratio ** np.float32(exponent)
    return raised


def _decoded(codes: Array, scale: Array, exponent: float, bits: int) -> Array:
    top = 2 ** (bits - 1) - 1
    weights: Array = table_of(exponent, bits)[(codes + top).astype(np.intp)] * scale
    return weights
