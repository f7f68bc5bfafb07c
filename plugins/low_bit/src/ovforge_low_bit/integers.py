"""Integers with a scale for each group of a row, and how a model holds them.

A matrix (outputs, width) is seen as (outputs, groups, size). Integers q lie between `low` and `high`; a weight is
(q - zero) * scale. Where it is symmetric, zero is 0 and low is -2^(bits-1); otherwise low is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge_low_bit.layers import store

__all__ = [
    "Integers",
    "constant_of",
    "divided",
    "grid",
    "group_of",
    "laid",
    "limits",
    "nearest",
    "ranges",
    "scale_type",
    "shaped",
    "stored",
    "whole",
]

_TINY = np.float32(1e-12)
_SMALLEST_GROUP = 8

Array = NDArray[Any]


@dataclass(frozen=True)
class Integers:
    """A quantized matrix: codes (outputs, groups, size) int8, or uint8 with zero points; scales (outputs, groups, 1).

    `zero` is None if it is symmetric, and has the shape of scales otherwise.
    """

    codes: Array
    scale: Array
    zero: Array | None
    bits: int

    def matrix(self) -> NDArray[np.float32]:
        """Return the weights that they stand for, (outputs, width)."""
        whole = self.codes.astype(np.float32) - (0 if self.zero is None else self.zero.astype(np.float32))
        return (whole * self.scale.astype(np.float32)).reshape(len(whole), -1)

    def output(self, shape: Sequence[int], transposed: bool = False, packed: bool = False) -> Any:
        """Return the weights as an output of OpenVINO's subgraph of compressed constants, in `shape`.

        Constant (u4, i4, u2, u3, i8, u8) -> Convert -> Subtract -> Multiply -> Reshape: what the CPU keeps as it is for
        a MatMul. 3 bits lie in 4 unless `packed`. 2 bits, and packed 3, are unsigned: symmetric ones get a zero point
        in the middle.
        """
        from openvino import opset13 as ops

        codes, zero = self.codes, self.zero
        if zero is None and (self.bits == 2 or packed):
            codes = (codes + 2 ** (self.bits - 1)).astype(np.uint8)
            zero = np.full(self.scale.shape, 2 ** (self.bits - 1), np.uint8)
        kind = ("i" if zero is None else "u") + str(self.bits if self.bits != 3 or packed else 4)
        real = "f16" if self.scale.dtype == np.float16 else "f32"
        weights = ops.convert(constant_of(laid(codes, transposed), kind), real)
        if zero is not None:
            points = constant_of(laid(zero, transposed), "u4" if kind == "u3" else kind)
            weights = ops.subtract(weights, ops.convert(points, real))
        return shaped(ops.multiply(weights, store(laid(self.scale, transposed))), shape)


def shaped(grouped: Any, shape: Sequence[int]) -> Any:
    """Return grouped weights in the shape that a layer takes them in."""
    from openvino import opset13 as ops

    return ops.reshape(grouped, store(np.array(shape, np.int64)), False).output(0)


def laid(array: Array, transposed: bool) -> Array:
    """Return (outputs, groups, size) in the order of a layer's weights: (groups, size, outputs) where transposed."""
    return array.transpose(1, 2, 0) if transposed else array


def group_of(width: int, wanted: int) -> int:
    """Return how many weights of a row share a scale, where `wanted` are asked for."""
    if wanted == -1 or wanted >= width:
        return width
    size = math.gcd(width, wanted)
    return size if size >= min(_SMALLEST_GROUP, wanted) else width


def divided(matrix: Array, group_size: int) -> Array:
    """Return (outputs, width) as (outputs, groups, size)."""
    return matrix.reshape(len(matrix), -1, group_of(matrix.shape[1], group_size))


def ranges(weights: Array) -> tuple[Array, Array]:
    """Return the least and the greatest weight of each group, 0 among them: (outputs, groups, 1)."""
    return np.minimum(weights.min(-1, keepdims=True), 0), np.maximum(weights.max(-1, keepdims=True), 0)


def grid(least: Array, greatest: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Return scale and zero point (as float32, whole) of groups with these ranges.

    Symmetric: the weight of the largest magnitude becomes -2^(bits-1), with a scale of its sign, so that no integer is
    lost; as in nncf. Otherwise scale = (greatest - least) / (2^bits - 1), zero = round(-least / scale).
    """
    if symmetric:
        largest = np.where(-least >= greatest, least, greatest)
        signed = -largest / np.float32(2 ** (bits - 1))
        return stored(np.where(np.abs(signed) < _TINY, 1, signed)), np.zeros_like(least)
    spread = (greatest - least) / np.float32(2**bits - 1)
    scale = stored(np.where(spread < _TINY, 1, spread))
    return scale, np.clip(np.round(-least / scale), 0, 2**bits - 1)


def scale_type(scale: Array) -> type[np.float16] | type[np.float32]:
    """Return float16 where it holds these scales to its full 11 bits, float32 otherwise."""
    sizes = np.abs(scale)
    return np.float16 if sizes.min() >= 2.0**-14 and sizes.max() <= 65504 else np.float32


def stored(scale: Array) -> NDArray[np.float32]:
    """Return scales as they will be stored, so that rounding is to the very numbers that the model will hold."""
    return scale.astype(scale_type(scale)).astype(np.float32)


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the least and the greatest integer."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def whole(codes: Array, scale: Array, zero: Array, bits: int, symmetric: bool) -> Integers:
    """Return whole numbers, held as floats until now, as Integers."""
    kind = np.int8 if symmetric else np.uint8
    return Integers(
        codes.astype(kind), scale.astype(scale_type(scale)), None if symmetric else zero.astype(np.uint8), bits
    )


def nearest(matrix: NDArray[np.float32], bits: int, symmetric: bool, group_size: int) -> Integers:
    """Return `matrix` rounded to the nearest integers: clip(round(W / scale + zero), low, high)."""
    weights = divided(matrix, group_size)
    scale, zero = grid(*ranges(weights), bits, symmetric)
    codes = np.clip(np.round(weights / scale + zero), *limits(bits, symmetric))
    return whole(codes, scale, zero, bits, symmetric)


def constant_of(codes: Array, kind: str) -> Any:
    """Return integers as a Constant of an OpenVINO type of 2, 3, 4 or 8 bits, packed as OpenVINO packs them."""
    import openvino as ov
    from openvino import opset13 as ops

    tensor = ov.Tensor(getattr(ov.Type, kind), ov.Shape(list(codes.shape)))
    bits = int(kind[1:])
    plain = np.ascontiguousarray(codes).reshape(-1).view(np.uint8) & (2**bits - 1)
    target = tensor.data.reshape(-1).view(np.uint8)
    target[:] = (plain if bits == 8 else _PACK[bits](plain))[: len(target)]
    return ops.constant(tensor)


def _padded(values: Array, multiple: int) -> Array:
    return np.pad(values, (0, -len(values) % multiple)).reshape(-1, multiple)


def _pack4(values: Array) -> Array:
    pairs = _padded(values, 2)
    packed: Array = pairs[:, 0] | pairs[:, 1] << 4
    return packed


def _pack2(values: Array) -> Array:
    shifts = np.array([0, 2, 4, 6], np.uint8)
    packed: Array = (_padded(values, 4) << shifts).sum(-1, dtype=np.uint8)
    return packed


def _pack3(values: Array) -> Array:
    """Eight in three bytes: two bits of each in two bytes, then the third bits in one; the first value leftmost."""
    eight = _padded(values, 8)
    shifts = np.array([6, 4, 2, 0], np.uint8)
    low = (eight & 3).reshape(-1, 2, 4) << shifts
    high = (eight >> 2) << np.arange(7, -1, -1, dtype=np.uint8)
    return np.concatenate([low.sum(-1, dtype=np.uint8), high.sum(-1, keepdims=True, dtype=np.uint8)], 1).reshape(-1)


_PACK = {2: _pack2, 3: _pack3, 4: _pack4}
