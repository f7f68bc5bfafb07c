"""Small models to test with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.model.bundle import ModelBundle

__all__ = ["run", "small_bundle", "small_model"]


def small_model() -> ov.Model:
    """Return a model of one matrix product: input "x" float32 (batch, 4), output "y" (batch, 3).

    Its operations are named "x", "weights" and "product" in every copy, so that they can be reported and kept.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, 4], np.float32, name="x")
    weights = ops.constant(np.arange(12, dtype=np.float32).reshape(4, 3) / 12, name="weights")
    product = ops.matmul(x, weights, False, False, name="product")
    model = ov.Model([product], [x], "small")
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    return model


def small_bundle() -> ModelBundle:
    """Return a bundle with `small_model` as the role "model"."""
    from ovforge.model.bundle import ModelBundle

    bundle = ModelBundle()
    bundle.models["model"] = small_model()
    return bundle


def run(model: ov.Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run `model` on the CPU in float32, on every processor alike; return output name -> array."""
    from ovforge.model.runtime import core

    results = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)
    return {name: array for port, array in results.items() for name in port.names}
