"""Weights back into few bits: the same type and groups as before, with scales and zero points computed anew.

Source of the formulas: nncf.compress_weights (NNCF 3.4, without data-aware options), which gives the same numbers for
the same weights. Integers: q = round(w / scale + zero point), symmetric or not; nf4: w / scale to the nearest level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["requantize"]

Array = NDArray[np.float32]

_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "nf4": 4}
_EPS = np.finfo(np.float32).eps


@dataclass
class _Stored:
    """What decompresses a weight: a constant of few bits -> [- zero point] -> * scale -> [reshape] -> [convert].

    Each field is the input that takes the constant.
    """

    numbers: ov.Input
    scale: ov.Input
    zero: ov.Input | None


def requantize(ports: Sequence[ov.Input], value: Array, where: str) -> None:
    """Store `value`, float32 in the layout of `ports`, as their compressed weight is stored.

    Raises ModelError for storage of another kind, or one that serves other layers, too.
    """
    stored = _find(ports, where)
    kind = _constant(stored.numbers).get_element_type().get_type_name()
    shape, groups = (tuple(_constant(port).get_output_shape(0)) for port in (stored.numbers, stored.scale))
    groups = (1,) * (len(shape) - len(groups)) + groups
    if any(few not in (1, size) for size, few in zip(shape, groups, strict=True)):
        raise _other(where, f"scales of {list(groups)} for numbers of {list(shape)}")
    axes = tuple(axis for axis, few in enumerate(groups) if few == 1)
    numbers = np.ascontiguousarray(value, np.float32).reshape(shape)
    if kind == "nf4":
        scale = _no_zeros(np.abs(numbers).max(axis=axes, keepdims=True))
        _replace(stored.numbers, numbers / scale)
    elif stored.zero is None or _middle(stored.zero, kind):
        if kind[0] == "u" and stored.zero is None:
            raise _other(where, f"{kind} without a zero point")
        scale = _signed_scale(numbers, axes, _BITS[kind])
        half = 2 ** (_BITS[kind] - 1)
        rounded = np.clip(np.round(numbers / scale), -half, half - 1)
        _replace(stored.numbers, rounded + half if kind[0] == "u" else rounded)
    else:
        if kind[0] != "u" or tuple(_constant(stored.zero).get_output_shape(0)) != _shape(stored.scale):
            raise _other(where, "zero points of another form than scales")
        scale, zero = _scale_and_zero(numbers, axes, 2 ** _BITS[kind] - 1)
        _replace(stored.zero, zero)
        _replace(stored.numbers, np.clip(np.round(numbers / scale + zero), 0, 2 ** _BITS[kind] - 1))
    largest = {"f16": 65504.0, "f32": 3.4e38}.get(_constant(stored.scale).get_element_type().get_type_name(), 0.0)
    if not np.abs(scale).max() <= largest:
        raise _other(where, f"scales up to {np.abs(scale).max():g}, too large for it")
    _replace(stored.scale, scale)


def _find(ports: Sequence[ov.Input], where: str) -> _Stored:
    """Return the inputs that take a compressed weight's constants, walking up from the layers."""
    node, users = ports[0].get_source_output().get_node(), len(ports)
    while node.get_type_name() in ("Convert", "Reshape"):
        users = _only_user(node, users, where)
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Multiply":
        raise _other(where, f"{node.get_type_name()}, not a product with scales")
    _only_user(node, users, where)
    numbers, scale = (_through_converts(node.input(n)) for n in (0, 1))
    if scale.get_source_output().get_node().get_type_name() != "Constant":
        raise _other(where, "scales that are computed")
    zero = None
    source = numbers.get_source_output().get_node()
    if source.get_type_name() == "Subtract":
        _only_user(source, 1, where)
        numbers, zero = (_through_converts(source.input(n)) for n in (0, 1))
        source = numbers.get_source_output().get_node()
        if zero.get_source_output().get_node().get_type_name() != "Constant":
            raise _other(where, "zero points that are computed")
    if source.get_type_name() != "Constant" or source.get_element_type().get_type_name() not in _BITS:
        raise _other(where, f"{source.get_type_name()} {source.get_output_element_type(0).get_type_name()}")
    return _Stored(numbers, scale, zero)


def _only_user(node: ov.Node, users: int, where: str) -> int:
    """Refuse what serves others, too; return how many users whatever is above it may have."""
    if len(node.output(0).get_target_inputs()) != users:
        raise _other(where, "a constant that other layers share")
    return 1


def _through_converts(port: ov.Input) -> ov.Input:
    """Return the input behind Converts."""
    while (node := port.get_source_output().get_node()).get_type_name() == "Convert":
        port = node.input(0)
    return port


def _constant(port: ov.Input) -> ov.Node:
    return port.get_source_output().get_node()


def _shape(port: ov.Input) -> tuple[int, ...]:
    return tuple(_constant(port).get_output_shape(0))


def _replace(port: ov.Input, value: NDArray[Any]) -> None:
    """Give an input a constant of the type, shape and name of the one that it takes."""
    from openvino import opset13 as ops

    old = _constant(port)
    kind = old.get_element_type()
    name = kind.get_type_name()
    numpy = {"i": np.int8, "u": np.uint8}.get(name[0], np.float32)
    made = ops.constant(np.ascontiguousarray(value.reshape(_shape(port)).astype(numpy)), dtype=kind)
    made.set_friendly_name(old.get_friendly_name())
    port.replace_source_output(made.output(0))


def _middle(zero: ov.Input, kind: str) -> bool:
    """Say whether a zero point is one number, the middle of an unsigned type: symmetric, stored unsigned."""
    node = _constant(zero)
    return kind[0] == "u" and int(np.prod(_shape(zero))) == 1 and _number(node) == 2 ** (_BITS[kind] - 1)


def _number(node: ov.Node) -> float:
    """Return a constant's one number; one of 4 bits is packed in the lower half of a byte."""
    packed = node.get_element_type().get_type_name() in ("i4", "u4")
    first = np.asarray(node.data).reshape(-1)[0]
    return float(int(first) & 0xF if packed else first)


def _signed_scale(numbers: Array, axes: tuple[int, ...], bits: int) -> Array:
    """Return scales of the sign that lets the largest number be -2 ** (bits - 1), which has no opposite."""
    low, high = np.abs(numbers.min(axis=axes, keepdims=True)), numbers.max(axis=axes, keepdims=True)
    return _no_zeros(np.where(low >= high, low, -high) / np.float32(2 ** (bits - 1)))


def _scale_and_zero(numbers: Array, axes: tuple[int, ...], levels: int) -> tuple[Array, Array]:
    """Return scales and zero points for numbers between 0 and `levels`; zero itself stays exact."""
    low = np.minimum(numbers.min(axis=axes, keepdims=True), np.float32(0))
    high = np.maximum(numbers.max(axis=axes, keepdims=True), np.float32(0))
    scale = _no_zeros((high - low) / np.float32(levels))
    return scale, np.clip(-np.round(low / scale), 0, levels).astype(np.float32)


def _no_zeros(scale: NDArray[Any]) -> Array:
    return np.where(np.abs(scale) < _EPS, _EPS, scale).astype(np.float32)


def _other(where: str, what: str) -> ModelError:
    return ModelError(
        f"its weight cannot be quantized again: it is stored with {what}",
        where=where,
        hint='Set compressed = "float16", or mode = "runtime".',
    )
