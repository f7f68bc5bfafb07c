"""Activations that leave float16's range are computed as a fraction of their values.

float16 ends at 65504, and the residual streams of large transformers go beyond: devices that compute in it then give
infinities. Recorded inputs show which values do. Those are divided by a power of two, which rounds nothing, as
OpenVINO's hint ACTIVATIONS_SCALE_FACTOR does on GPUs; here the graph itself is changed, so that it holds on every
device, and only the part that needs it.

What becomes of a value that is divided by s follows from the operation, as units do in physics: a value with the power
k stands for itself times s^k. Products add powers, sums need equal ones, and normalizations lose them: a mean and
variance of x / s normalize it to the same numbers, if the small number that is added to the variance is divided too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from math import ceil, log2
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_low_bit.activations import results
from ovforge_low_bit.layers import constants_of, left_alone, roles_of, store
from ovforge_low_bit.options import HalfRangeOptions
from ovforge_low_bit.stage import recorded

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["HalfRange", "peaks", "scale_down"]

LARGEST = 65504.0
"""The largest number of float16."""

Port = tuple[str, int]
Array = NDArray[Any]

_FLOATS = ("f32", "f16", "bf16", "f64")
_SAME = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "Split", "VariadicSplit", "Gather",
    "Broadcast", "Tile", "Interpolate", "MaxPool", "AvgPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
    "Relu", "PRelu", "Abs", "Negative", "Convert", "Identity", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
_SUMS: Mapping[str, Callable[[int], range]] = {
    "Add": range, "Subtract": range, "Maximum": range, "Minimum": range, "Concat": range,
    "Select": lambda inputs: range(1, inputs), "Pad": lambda inputs: range(0, inputs, 3),
}  # fmt: skip
"""Operations that need one power for all of their values -> which inputs those are, of so many."""

_PRODUCTS = (
    "Multiply", "MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData"
)  # fmt: skip
_ATTENTION = "ScaledDotProductAttention"
_FOLDED = 1 << 16
"""Values of a constant up to which it is divided itself, so that the runtime finds what it knows how to fuse."""


class HalfRange:
    """Divides what leaves the range of float16, with some room, by a power of two."""

    def __init__(self, options: HalfRangeOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Measure each role on recorded inputs, and change those that need it.

        Raises ModelError if a model's values are not finite in float32, and if nothing was recorded.
        """
        report, options = Report(), self.options
        limit = LARGEST / options.headroom
        for role, records in self._recorded(bundle, calibration, report):
            model = bundle.models[role]
            kept = left_alone(model, options, keep.get(role, ()), report)
            before = peaks(model, records, role)
            over = {port: peak for port, peak in before.items() if peak > limit and port[0] not in kept}
            highest = max(before.values(), default=0.0)
            if not over:
                report.notes.append(f"{role}: left as it is, because its values are at most {highest:.3g}")
                continue
            factor = 2.0 ** ceil(log2(max(over.values()) / limit))
            changed = model.clone()
            names = scale_down(changed, over, factor)
            after = peaks(changed, records, role)
            _check_same(model, changed, records[0], role)
            bundle.put(role, changed)
            report.roles += (role,)
            report.layers[role] = names
            report.applied.append(
                f"{role}: values of up to {highest:.3g} are divided by {factor:g} in {len(names)} operations"
            )
            beyond = sorted(name for (name, _), peak in after.items() if peak > LARGEST)
            if beyond:
                report.notes.append(
                    f"{role}: {len(beyond)} operations still leave float16's range, because what takes their results "
                    f"needs the values themselves: {', '.join(beyond[:3])}; let the device compute in f32 or bf16"
                )
        return report

    def _recorded(
        self, bundle: ModelBundle, calibration: Calibration, report: Report
    ) -> list[tuple[str, Sequence[Mapping[str, Array]]]]:
        """Return the roles with what was recorded of them. A role that was not asked for need not run at all."""
        found, errors = [], []
        for role in roles_of(bundle, self.options, "f16-range"):
            try:
                found.append((role, recorded(calibration, role, self.options.samples, "f16-range")))
            except ModelError as error:
                if self.options.roles:
                    raise
                errors.append(error)
                report.notes.append(f"{role}: left as it is: {error.what}")
        if errors and not found:
            raise errors[0]
        return found


def peaks(model: ov.Model, records: Sequence[Mapping[str, Array]], role: str) -> dict[Port, float]:
    """Return the largest absolute value of each of a model's floating-point results, over all records.

    Left out are squares on their way to a mean, because the runtime computes those of a normalization in float32, and
    what stands for infinity, as masks do and logarithms that nobody uses. Raises ModelError for results that are not
    finite.
    """
    from openvino import opset13 as ops

    copy = model.clone()
    fixed, squares = constants_of(copy), _squares(copy)
    ports: list[Port] = []
    for op in copy.get_ordered_ops():
        name = op.get_friendly_name()
        if op.get_name() in fixed or op.get_type_name() in (*_IGNORED, *_SAME) or name in squares:
            continue
        for output in op.outputs():
            if output.get_element_type().get_type_name() in _FLOATS:
                row = ops.absolute(ops.reshape(output, store(np.array([-1])), False))
                kind = output.get_element_type().to_dtype()
                counted = ops.select(ops.less(row, store(np.array(_INFINITE, kind))), row, store(np.array(0, kind)))
                largest = ops.reduce_max(counted, store(np.array([0])), keep_dims=False)
                ports.append((name, output.get_index()))
                copy.add_results([ops.result(largest)])
    found = dict.fromkeys(ports, 0.0)
    own = len(model.outputs)
    for values in results(copy, records):
        if not all(np.isfinite(value).all() for value in values[:own]):
            raise ModelError(
                "it gives infinities or NaN even in float32",
                where=role,
                hint="The model's weights are damaged, or the inputs are: run it without quantizers first.",
            )
        for port, value in zip(ports, values[own:], strict=True):
            found[port] = max(found[port], float(value))
    return found


_INFINITE = 1e30
"""Where numbers begin that masks have for infinity: they may become infinite."""

_IGNORED = ("Parameter", "Result", "Constant", "ReadValue", "Assign")


def scale_down(model: ov.Model, over: Collection[Port], factor: float) -> list[str]:
    """Compute the results `over`, and what follows from them, as a fraction 1 / factor; what leaves the model does not.

    Returns the names of the operations whose results are divided.
    """
    return _Scaling(model, set(over), factor).apply()


class _Scaling:
    """Walks a model in its order, and keeps each result's power of the factor."""

    def __init__(self, model: ov.Model, over: set[Port], factor: float) -> None:
        self._model, self._over, self._factor = model, over, factor
        self._fixed = constants_of(model)
        self._powers: dict[Port, Fraction] = {}
        self._made: dict[tuple[str, int, Fraction], Any] = {}

    def apply(self) -> list[str]:
        names = []
        for op in self._model.get_ordered_ops():
            if op.get_name() in self._fixed or op.get_type_name() == "Parameter":
                continue
            wanted = any((op.get_friendly_name(), output.get_index()) in self._over for output in op.outputs())
            power = self._power(op, wanted)
            if power:
                names.append(op.get_friendly_name())
                for output in op.outputs():
                    self._powers[op.get_name(), output.get_index()] = power
        self._model.validate_nodes_and_infer_types()
        return names

    def _power(self, op: Any, wanted: bool) -> Fraction:
        """Give an operation inputs that fit together, and return the power of what it makes of them."""
        kind, inputs = op.get_type_name(), range(len(op.inputs()))
        own = [self._of(op, place) for place in inputs]
        none = Fraction(0)
        if kind in _SAME and op.get_output_element_type(0).get_type_name() in _FLOATS:
            return self._to(op, 0, Fraction(1)) if wanted and own[0] <= 0 else own[0]
        if kind in _SUMS:
            places = _SUMS[kind](len(own))
            power = max(own[place] for place in places)
            power = Fraction(1) if wanted and power <= 0 else power
            for place in places:
                self._to(op, place, power)
            return power
        if kind in _PRODUCTS:
            if wanted and own[0] + own[1] <= 0:
                place = 1 if op.input_value(0).get_node().get_name() in self._fixed else 0
                own[place] = self._to(op, place, own[place] + 1 - own[0] - own[1])
            return own[0] + own[1]
        if kind == "Divide":
            return own[0] - own[1]
        if kind == "Sqrt" and (own[0] / 2).denominator == 1:
            return own[0] / 2
        if kind == "Power" and own[0] and (exponent := _number(op.input_value(1).get_node())) is not None:
            power = own[0] * Fraction(exponent).limit_denominator(16)
            if power.denominator == 1:
                return power
        if kind in ("MVN", "GroupNormalization") and own[0]:
            attributes = op.get_attributes()
            if attributes.get("normalize_variance", True):
                name = "eps" if kind == "MVN" else "epsilon"
                inside = str(attributes.get("eps_mode", "inside_sqrt")).lower() == "inside_sqrt"
                op.set_attribute(name, float(attributes[name]) / self._factor ** float((2 if inside else 1) * own[0]))
                return none
            return own[0]
        if kind == _ATTENTION:
            for place in inputs:
                if place != _VALUES:
                    self._to(op, place, none)
            return own[_VALUES]
        for place in inputs:
            self._to(op, place, none)
        return none

    def _of(self, op: Any, place: int) -> Fraction:
        source = op.input_value(place)
        return self._powers.get((source.get_node().get_name(), source.get_index()), Fraction(0))

    def _to(self, op: Any, place: int, power: Fraction) -> Fraction:
        """Let an input have a power; return it. An input that has it, or that is not a float, stays as it is."""
        from openvino import opset13 as ops

        source, own = op.input_value(place), self._of(op, place)
        kind = source.get_element_type()
        if own == power or kind.get_type_name() not in _FLOATS:
            return own
        key = source.get_node().get_name(), source.get_index(), power
        if key not in self._made:
            times = self._factor ** float(own - power)
            node = source.get_node()
            constant = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
            if constant.get_type_name() == "Constant" and constant.get_byte_size() <= 4 * _FOLDED:
                self._made[key] = store((constant.get_data(dtype=np.float32) * times).astype(kind.to_dtype()))
            else:
                made = ops.multiply(source, store(np.array(times, kind.to_dtype())))
                made.set_friendly_name(f"{node.get_friendly_name()}/f16_range")
                self._made[key] = made
        op.input(place).replace_source_output(self._made[key].output(0))
        self._powers[self._made[key].get_name(), 0] = power
        return power


_VALUES = 2
"""The input of attention that its result is a mean of."""


def _squares(model: ov.Model) -> set[str]:
    """Return the friendly names of squares and of what is made of them before a root is taken."""
    found: set[str] = set()
    names: set[str] = set()
    for op in model.get_ordered_ops():
        kind, sources = op.get_type_name(), [(v.get_node().get_name(), v.get_index()) for v in op.input_values()]
        squared = (kind == "Multiply" and sources[0] == sources[1]) or (
            kind == "Power" and _number(op.input_value(1).get_node()) == 2
        )
        follows = kind in ("ReduceMean", "ReduceSum", "Add", "Convert") and sources[0][0] in found
        if squared or follows:
            found.add(op.get_name())
            names.add(op.get_friendly_name())
    return names


def _number(node: Any) -> float | None:
    """Return the one number that a constant holds; None if it is something else."""
    node = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
    if node.get_type_name() != "Constant" or int(np.prod(node.get_output_shape(0))) != 1:
        return None
    return float(node.get_data(dtype=np.float32).reshape(()))


def _check_same(before: ov.Model, after: ov.Model, record: Mapping[str, Array], role: str) -> None:
    """Raise ModelError unless both give the same results for a record, but for rounding."""
    for mine, theirs in zip(*(next(results(model, [record])) for model in (after, before)), strict=True):
        span = float(np.abs(theirs).max(initial=0.0))
        if mine.shape != theirs.shape or np.abs(mine - theirs).max(initial=0.0) > 1e-3 * span:
            raise ModelError(
                "dividing its values changed what it computes",
                where=f"quantize (f16-range), role {role}",
                hint="Leave this role out of `roles`, let the device compute in bf16 or f32, and please report it.",
            )
