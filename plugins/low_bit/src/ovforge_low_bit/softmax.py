"""Softmax bias correction, for models whose softmax outputs were quantized (by nncf-ptq, say).

Pandey, Fournarakis, Patel, Nagel: "Softmax Bias Correction for Quantized Generative Models", 2023, arXiv:2309.01729.
Quantization rounds the many small probabilities of a long row to 0, so that rows no longer sum to 1: it shifts the
mean. Over rows y of n probabilities, and their quantized Q(y), the shift is made up for by its mean over calibration

    beta = mean of (sum_i y_i - sum_i Q(y_i)) / n = mean of (1 - sum_i Q(y_i)) / n,  Q'(y) = Q(y) + beta

one for each tensor or head. It costs nothing at run time: it moves both ends of the FakeQuantize's output range, which
is where the quantizer's zero point comes from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report, Skipped
from ovforge.model import ModelBundle
from ovforge_low_bit.activations import observed
from ovforge_low_bit.layers import constant_bytes, left_alone, roles_of, store
from ovforge_low_bit.options import SoftmaxBiasOptions
from ovforge_low_bit.stage import recorded

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["SoftmaxBias", "biases", "quantized_softmaxes"]

_LOW, _HIGH = 3, 4
"""Inputs of FakeQuantize that are its output range."""


class SoftmaxBias:
    """Adds the measured bias to quantized softmax outputs."""

    def __init__(self, options: SoftmaxBiasOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Measure and correct each softmax whose output is quantized; a role without one is skipped."""
        report = Report(bytes_before=0, bytes_after=0)
        for role in roles_of(bundle, self.options, "softmax-bias"):
            model = bundle.models[role]
            before = constant_bytes(model)
            kept = left_alone(model, self.options, keep.get(role, ()), report)
            quantizers = [op for op in quantized_softmaxes(model) if op.get_friendly_name() not in kept]
            if not quantizers:
                report.skipped.append(Skipped(role, _why_none(model)))
                continue
            records = recorded(calibration, role, self.options.samples, "softmax-bias")
            means = biases(model, quantizers, records, self.options.granularity == "head")
            for op, bias in zip(quantizers, means, strict=True):
                for place in (_LOW, _HIGH):
                    ends = op.input_value(place).get_node().get_data(dtype=np.float32) + bias
                    kind = op.input_value(place).get_element_type().to_dtype()
                    op.input(place).replace_source_output(store(ends.astype(kind)).output(0))
            report.roles += (role,)
            report.layers[role] = [op.get_friendly_name() for op in quantizers]
            report.bytes_before = (report.bytes_before or 0) + before
            report.bytes_after = (report.bytes_after or 0) + constant_bytes(model)
            largest = max(float(np.abs(bias).max()) for bias in means)
            report.applied.append(f"{role}: {len(quantizers)} softmax outputs, by up to {largest:.2e}")
        return report


def quantized_softmaxes(model: ov.Model) -> list[Any]:
    """Return the FakeQuantize operations that stand right after a Softmax, with a constant output range."""
    return [
        op
        for op in model.get_ordered_ops()
        if op.get_type_name() == "FakeQuantize"
        and op.input_value(0).get_node().get_type_name() == "Softmax"
        and all(op.input_value(place).get_node().get_type_name() == "Constant" for place in (_LOW, _HIGH))
    ]


def biases(
    model: ov.Model, quantizers: Sequence[Any], records: Sequence[Mapping[str, NDArray[Any]]], by_head: bool
) -> list[NDArray[np.float32]]:
    """Return, for each quantizer, the mean of what goes in less what comes out, broadcasting over its output.

    The mean is over all axes; of four axes (batch, heads, rows, columns) all but heads, where it is `by_head`.
    """
    ports = []
    for op in quantizers:
        source = op.input_value(0)
        ports += [(source.get_node().get_friendly_name(), source.get_index()), (op.get_friendly_name(), 0)]
    totals: list[Any] = [0.0] * len(quantizers)
    for arrays in observed(model, ports, records):
        for index, (exact, rounded) in enumerate(zip(arrays[::2], arrays[1::2], strict=True)):
            axes = (0, 2, 3) if by_head and exact.ndim == 4 else None
            totals[index] = totals[index] + (exact - rounded).mean(axis=axes, keepdims=True, dtype=np.float64)
    return [(total / len(records)).astype(np.float32) for total in totals]


def _why_none(model: ov.Model) -> str:
    kinds = {op.get_type_name() for op in model.get_ops()}
    if "Softmax" in kinds:
        return "no softmax output in it is quantized: quantize activations first (nncf-ptq), then correct the bias"
    if "ScaledDotProductAttention" in kinds:
        return "its softmax is inside ScaledDotProductAttention, which no quantizer opens: it stays exact, without bias"
    return "it has no softmax"
