"""The quantizer itself: symmetric eight-bit weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from openvino import opset13 as ops
from ovforge.contracts import Calibration, Report, Skipped
from ovforge.model import ModelBundle
from pydantic import BaseModel, ConfigDict, Field

NOTHING: Mapping[str, Collection[str]] = {}


class Options(BaseModel):
    """What a config may say. A misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: tuple[str, ...] = Field((), description="Which models of the pipeline; all of them by default.")


class Quantizer:
    """Replaces the float32 weights of each MatMul by integers of -127 to 127 times a scale for each output."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = NOTHING
    ) -> Report:
        """Change the bundle in place; report the layers that were lowered, and leave alone those in `keep`."""
        report = Report()
        for role in self.options.roles or tuple(bundle.models):
            if role not in bundle.models:
                report.skipped.append(Skipped(role, f"the model has only {', '.join(bundle.models)}"))
                continue
            lowered = _lower(bundle.models[role], keep.get(role, ()))
            if lowered:
                report.roles += (role,)
                report.layers[role] = lowered
                report.applied.append(f"{role}: {len(lowered)} layers in eight bits")
            else:
                report.notes.append(f"{role}: there is no layer to lower")
        return report


def _lower(model: Any, kept: Collection[str]) -> list[str]:
    """Change the layers of one model, but for those that are kept; return the names of those that were changed."""
    lowered = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "MatMul" or operation.get_friendly_name() in kept:
            continue
        constant = operation.input_value(1).get_node()
        if constant.get_type_name() != "Constant" or constant.get_element_type().get_type_name() != "f32":
            continue
        inputs = -1 if operation.get_attributes()["transpose_b"] else -2
        compressed = _compressed(constant.get_data(), inputs)
        operation.input(1).replace_source_output(compressed.output(0))
        lowered.append(operation.get_friendly_name())
    model.validate_nodes_and_infer_types()
    return lowered


def _compressed(weights: Any, axis: int) -> Any:
    """Return Multiply(Convert(integers), scales), a form that OpenVINO computes without unpacking the weights."""
    largest = np.abs(weights).max(axis=axis, keepdims=True)
    scales = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    integers = np.rint(weights / scales).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(integers), np.float32), ops.constant(scales))
