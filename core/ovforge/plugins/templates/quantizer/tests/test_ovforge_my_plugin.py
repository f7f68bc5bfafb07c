"""The plugin keeps ovforge's contract, and its error stays below half a step of the scale."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from ovforge import testing
from ovforge.model import ModelBundle

import ovforge_my_plugin

WEIGHTS = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)


def two_layers() -> ModelBundle:
    """Return a bundle with two layers, of which one can be kept."""
    x = ops.parameter([-1, 16], np.float32, name="x")
    first = ops.matmul(x, WEIGHTS[0], False, False, name="first")
    second = ops.matmul(first, WEIGHTS[1], False, True, name="second")
    model = ov.Model([second], [x], "two layers")
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    bundle = ModelBundle()
    bundle.models["model"] = model
    return bundle


def quantizer(**options: object) -> object:
    described = testing.extension(ovforge_my_plugin, "quantizer", "my-plugin")
    return described.create(described.options_model()(**options))


def test_contract() -> None:
    testing.check_plugin(ovforge_my_plugin)
    nothing = testing.FixedCalibration({})
    for bundle in (testing.small_bundle, two_layers):
        testing.check_quantizer(ovforge_my_plugin, "my-plugin", {}, bundle, nothing)


def test_each_weight_is_off_by_half_a_step_or_less() -> None:
    bundle = two_layers()
    report = quantizer().quantize(bundle, testing.FixedCalibration({}), {"model": ["second"]})
    assert report.layers == {"model": ["first"]}
    identity = np.linalg.inv(WEIGHTS[1].T.astype(np.float64)).astype(np.float32)
    weights = testing.run(bundle.models["model"], {"x": np.eye(16, dtype=np.float32)})["y"] @ identity
    step = np.abs(WEIGHTS[0]).max(axis=0) / 127
    assert (np.abs(weights - WEIGHTS[0]) <= step / 2 + 1e-3).all()


def test_a_role_that_is_missing_is_reported() -> None:
    report = quantizer(roles=("unet",)).quantize(two_layers(), testing.FixedCalibration({}))
    assert report.skipped[0].item == "unet"
