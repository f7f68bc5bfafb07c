"""The weights of MatMul and Convolution: finding them, reading them as matrices, counting bytes.

A weight matrix here is always (outputs, inputs): MatMul's as it multiplies from the right, a convolution's kernel
(O, I, height, width) with its last three axes in a row, which is the order that `activations.rows` unfolds inputs in.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Report, Skipped
from ovforge.errors import ConfigError, ModelError, did_you_mean
from ovforge.model import ModelBundle

if TYPE_CHECKING:
    import openvino as ov

    from ovforge_low_bit.options import RolesOptions, ScopeOptions

__all__ = ["Layer", "constant_bytes", "constants_of", "find_layers", "left_alone", "roles_of", "store"]

_REAL = ("f32", "f16", "bf16", "f64")


@dataclass(frozen=True)
class Layer:
    """One operation with constant weights."""

    op: Any
    constant: Any

    @property
    def name(self) -> str:
        """The operation's friendly name."""
        name: str = self.op.get_friendly_name()
        return name

    @property
    def is_convolution(self) -> bool:
        """Whether it is a Convolution; otherwise a MatMul."""
        return bool(self.op.get_type_name() == "Convolution")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights as the operation takes them."""
        return tuple(self.constant.get_output_shape(0))

    @property
    def is_transposed(self) -> bool:
        """Whether the weights lie as (inputs, outputs)."""
        return not self.is_convolution and not self.op.get_attributes()["transpose_b"]

    @property
    def width(self) -> int:
        """Inputs of one output: the length of a row."""
        return int(self.shape[0] if self.is_transposed else np.prod(self.shape[1:]))

    @property
    def outputs(self) -> int:
        """Rows of its matrix."""
        return int(self.shape[1] if self.is_transposed else self.shape[0])

    def matrix(self) -> NDArray[np.float32]:
        """Return the weights, (outputs, inputs) float32. Raises ModelError if they are not finite."""
        weights: NDArray[np.float32] = self.constant.get_data(dtype=np.float32)
        if not np.isfinite(weights).all():
            raise ModelError(
                "its weights hold infinities or NaN",
                where=self.name,
                hint="Convert the model again, in float32; or leave this layer out with `ignored`.",
            )
        return np.ascontiguousarray(weights.T) if self.is_transposed else weights.reshape(len(weights), -1)

    def set_weights(self, output: Any) -> None:
        """Let the operation take its weights from `output`, of the same shape."""
        wanted = self.op.input_value(1).get_element_type()
        if output.get_element_type() != wanted:
            from openvino import opset13 as ops

            output = ops.convert(output, wanted.get_type_name()).output(0)
        self.op.input(1).replace_source_output(output)


def find_layers(model: ov.Model, options: ScopeOptions, keep: Collection[str], report: Report) -> list[Layer]:
    """Return the layers that `options` ask for, in the order in which they run.

    Those whose weights cannot be changed go to report.skipped, with the reason; those to be left alone to its notes.
    """
    constants = constants_of(model)
    layers: list[Layer] = []
    kept = left_alone(model, options, keep, report)
    for op in model.get_ordered_ops():
        if op.get_name() in constants or op.get_type_name() not in options.types or op.get_friendly_name() in kept:
            continue
        sides = [value.get_node().get_name() in constants for value in op.input_values()]
        if not any(sides):
            continue  # a product of activations
        if _is_outer(op):
            continue  # places times frequencies: a product that sums nothing up has no weights
        found = _layer(op, sides)
        if isinstance(found, Layer):
            layers.append(found)
        else:
            report.skipped.append(Skipped(op.get_friendly_name(), found))
    return layers


def constants_of(model: ov.Model) -> set[str]:
    """Return the names of the operations whose results follow from constants alone."""
    found: set[str] = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() not in _CHANGING and all(v.get_node().get_name() in found for v in op.input_values()):
            found.add(op.get_name())
    return found


_CHANGING = ("Parameter", "Result", "ReadValue", "Assign")


def _is_outer(op: Any) -> bool:
    """Say whether it is a MatMul of a column and a row, as rotary positions are made of."""
    if op.get_type_name() != "MatMul":
        return False
    shape = op.input_value(0).get_partial_shape()
    if shape.rank.is_dynamic or len(shape) < 2:
        return False
    summed = shape[len(shape) - (2 if op.get_attributes()["transpose_a"] else 1)]
    return bool(summed.is_static and summed.get_length() == 1)


def _layer(op: Any, sides: list[bool]) -> Layer | str:
    """Return the layer, or why it is none."""
    if not sides[1]:
        return "its weights are the left side of the product"
    constant = op.input_value(1).get_node()
    if constant.get_type_name() == "Convert":
        constant = constant.input_value(0).get_node()
    if constant.get_type_name() != "Constant" or constant.get_element_type().get_type_name() not in _REAL:
        return "its weights are quantized already, or computed"
    if op.get_type_name() == "MatMul" and len(constant.get_output_shape(0)) != 2:
        return f"its weights have {len(constant.get_output_shape(0))} axes, not 2"
    if sum(len(output.get_target_inputs()) for output in (constant.output(0), op.input_value(1))) > 2:
        return "its weights are shared with another operation"
    return Layer(op, constant)


def left_alone(model: ov.Model, options: RolesOptions, keep: Collection[str], report: Report) -> set[str]:
    """Return the operations not to be touched. Raises ConfigError if one that is named is not there."""
    names = {op.get_friendly_name() for op in model.get_ops()}
    for name in options.ignored:
        if name not in names:
            raise ConfigError(
                f"the model has no operation {name!r}.{did_you_mean(name, names)}",
                where="ignored",
                hint="`ovforge inspect` lists operations; ignored_patterns takes regular expressions.",
            )
    fitting = {name for name in names for pattern in options.ignored_patterns if re.fullmatch(pattern, name)}
    kept = fitting | set(options.ignored) | set(keep)
    if kept:
        report.notes.append(f"left as they are, as asked: {len(kept & names)} operations")
    return kept


def roles_of(bundle: ModelBundle, options: RolesOptions, quantizer: str) -> list[str]:
    """Return the roles asked for, by default all but tokenizers. Raises ConfigError for one that there is not."""
    own = [role for role in bundle.models if not role.startswith(("tokenizer", "detokenizer"))]
    for role in options.roles:
        if role not in own:
            raise ConfigError(
                f"the model has no {role!r} to change.{did_you_mean(role, own)}",
                where=f"quantize ({quantizer}).roles",
                hint=f"It has: {', '.join(own)}.",
            )
    return list(options.roles) or own


def store(array: NDArray[Any]) -> Any:
    """Return a Constant of a numpy array."""
    from openvino import opset13 as ops

    return ops.constant(np.asarray(array, order="C"))


def constant_bytes(model: ov.Model) -> int:
    """Return the bytes of all constants of a model."""
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
