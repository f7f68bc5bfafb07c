"""What is quantized in a model, read off its graph: no nncf needed, the same answer for anybody's models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "CONVOLUTIONS",
    "LOW",
    "PASSING",
    "Lowered",
    "constant_bytes",
    "counted",
    "float_bytes",
    "is_quantized",
    "lowered",
]

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")

LOW = {
    "i8": "INT8", "u8": "INT8", "i4": "INT4", "u4": "INT4", "u3": "INT3", "u6": "INT6", "i2": "INT2", "u2": "INT2",
    "nf4": "NF4", "f4e2m1": "FP4", "f8e4m3": "FP8", "f8e5m2": "FP8",
}  # fmt: skip
"""Element type of a constant -> what reports call it."""

_LEVELS = {2: "INT1", 4: "INT2", 15: "INT4", 16: "INT4", 255: "INT8", 256: "INT8", 65535: "INT16", 65536: "INT16"}
_FAKE = ("FakeQuantize", "FakeConvert")
_DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Squeeze", "Unsqueeze", *_FAKE}
"""Operations between a compressed constant and the operation that it belongs to."""
PASSING = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "StridedSlice", "Slice", "Concat", "Pad",
    "MaxPool", "ReduceMax", "Tile", "Broadcast", "ShuffleChannels", "DepthToSpace", "SpaceToDepth", "Relu", "ReLU",
    "Interpolate", "ScatterUpdate",
}  # fmt: skip
"""Operations that only pass values on, through which quantizers act on what comes after."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """An operation whose weights or activations have a lower precision; None for what has not."""

    name: str
    kind: str
    weights: str | None = None
    activations: str | None = None

    @property
    def precision(self) -> str:
        """What a report says of it."""
        if self.weights is None or self.activations is None:
            return self.activations or f"{self.weights} weights"
        if self.weights == self.activations:
            return self.activations
        return f"{self.activations} with {self.weights} weights"


def lowered(model: ov.Model) -> list[Lowered]:
    """Return the operations of `model` that were quantized, in the graph's order."""
    weights: dict[str, tuple[int, str]] = {}
    activations: dict[str, str] = {}
    ordered = model.get_ordered_ops()
    constant = _constant(ordered)
    for op in ordered:
        kind = op.get_type_name()
        if kind == "Constant":
            # The largest constant is the weight; scales, zero points and codebooks are smaller.
            size = _size(op)
            for user, through, label in _users(op, constant) if size > 1 else ():
                name = user.get_friendly_name()
                found = label or LOW.get(op.get_element_type().get_type_name())
                if found and size > weights.get(name, (0, ""))[0]:
                    weights[name] = size, "codebook" if through else found
        elif kind in _FAKE and op.get_friendly_name() not in constant:
            for user in _sinks(op):
                activations[user.get_friendly_name()] = _fake(op)
    both = weights.keys() | activations.keys()
    return [
        Lowered(name, op.get_type_name(), weights.get(name, (0, None))[1], activations.get(name))
        for op in ordered
        if (name := op.get_friendly_name()) in both
    ]


def is_quantized(model: ov.Model) -> str:
    """Return how much of `model` is quantized already, or "" if nothing is."""
    return counted(lowered(model))


def counted(found: Iterable[Lowered]) -> str:
    """Return "52 Convolution, 98 MatMul in INT8; 3 Gather in INT8 weights"."""
    kinds: dict[str, Counter[str]] = {}
    for op in found:
        kinds.setdefault(op.precision, Counter())[op.kind] += 1
    return "; ".join(
        f"{', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))} in {precision}"
        for precision, counts in sorted(kinds.items())
    )


def constant_bytes(model: ov.Model) -> int:
    """Return the bytes of all constants."""
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")


def float_bytes(model: ov.Model) -> int:
    """Return what the constants of floating point take as float32, which is how they are computed with."""
    kinds = ("f32", "f16", "bf16", "f64")
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return 4 * sum(_size(op) for op in constants if op.get_element_type().get_type_name() in kinds)


def _size(op: Any) -> int:
    size = 1
    for side in op.get_output_shape(0):
        size *= side
    return size


def _targets(op: Any) -> Iterator[Any]:
    for port in op.outputs():
        yield from port.get_target_inputs()


def _users(weight: Any, constant: set[str]) -> Iterator[tuple[Any, bool, str | None]]:
    """Give (operation, whether through a codebook, precision of a FakeQuantize) for all that use a constant."""
    waiting: list[tuple[Any, bool, str | None]] = [(weight, False, None)]
    seen = set()
    while waiting:
        op, through, label = waiting.pop()
        for target in _targets(op):
            user = target.get_node()
            kind, name = user.get_type_name(), user.get_friendly_name()
            key = name, through, label
            if key in seen:
                continue
            seen.add(key)
            if kind == "Gather" and name in constant:
                if target.get_index() == 1:  # numbers of entries in a codebook, which is input 0
                    waiting.append((user, True, label))
            elif kind in _DECOMPRESSION and name in constant:
                if kind in _FAKE:
                    label = _fake(user) if target.get_index() == 0 else None  # its other inputs are ranges
                waiting.append((user, through, label))
            else:
                yield user, through, label


def _constant(ordered: Iterable[Any]) -> set[str]:
    """Return the names of operations whose values depend on constants alone."""
    names: set[str] = set()
    for op in ordered:
        inputs = [value.get_node().get_friendly_name() for value in op.input_values()]
        if op.get_type_name() == "Constant" or (inputs and names.issuperset(inputs)):
            names.add(op.get_friendly_name())
    return names


def _sinks(op: Any) -> Iterator[Any]:
    """Give the operations that compute with what a quantizer gives."""
    waiting, seen = [op], set()
    while waiting:
        for target in _targets(waiting.pop()):
            user = target.get_node()
            if (name := user.get_friendly_name()) in seen:
                continue
            seen.add(name)
            if user.get_type_name() in PASSING:
                waiting.append(user)
            elif user.get_type_name() not in ("Result", "ShapeOf", *_FAKE):
                yield user


def _fake(op: Any) -> str:
    """Return the precision that a FakeQuantize or FakeConvert stands for."""
    attributes = op.get_attributes()
    if op.get_type_name() == "FakeQuantize":
        return _LEVELS.get(int(attributes["levels"]), f"{attributes['levels']} levels")
    return LOW.get(str(attributes.get("destination_type", "f8e4m3")), "FP8")
