"""Phases of timesteps stay in float32 on a device that computes in fewer bits, however a model is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovforge import Pipeline
from ovforge.model import ModelBundle, core
from ovforge_diffusion.graph.exact_timesteps import ExactTimesteps
from ovforge_diffusion.graph.phases import MARK, keep_phases

HALF = 32


def waves(phases: ov.Output, sample: ov.Output) -> ov.Output:
    weights = ops.constant(np.random.default_rng(0).standard_normal((2 * HALF, 8)).astype(np.float32))
    told = ops.matmul(ops.concat([ops.sin(phases), ops.cos(phases)], 1), weights, False, False)
    return ops.add(told, sample).output(0)


def frequencies() -> ov.Node:
    return ops.constant(np.exp(-np.log(1e4) * np.arange(HALF) / HALF).astype(np.float32)[None])


def as_a_unet(name: str) -> ov.Model:
    """As torch is traced: whole numbers, one for all rows of the sample."""
    sample = ops.parameter([-1, 8], ov.Type.f32, name="sample")
    timestep = ops.parameter([], ov.Type.i64, name=name)
    rows = ops.gather(ops.shape_of(sample), ops.constant([0]), ops.constant(0))
    each = ops.broadcast(ops.reshape(timestep, ops.constant([1]), False), rows)
    column = ops.convert(ops.unsqueeze(each, ops.constant(1)), "f32")
    return ov.Model(
        [ops.result(waves(ops.multiply(column, frequencies()).output(0), sample.output(0)))], [sample, timestep]
    )


def as_a_transformer(name: str) -> ov.Model:
    """With two operations in a row that make a column, which the runtime joins."""
    sample = ops.parameter([-1, 8], ov.Type.f32, name="sample")
    timestep = ops.parameter([-1], ov.Type.f32, name=name)
    scaled = ops.multiply(timestep, ops.constant(np.float32(1000)))
    column = ops.reshape(ops.unsqueeze(scaled, ops.constant(1)), ops.constant([-1, 1]), False)
    return ov.Model(
        [ops.result(waves(ops.multiply(column, frequencies()).output(0), sample.output(0)))], [sample, timestep]
    )


def run(model: ov.Model, precision: str, timestep: float) -> np.ndarray:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    port = compiled.inputs[1]
    value = np.full([1] * len(port.get_partial_shape()), timestep, port.get_element_type().to_dtype())
    return np.asarray(compiled([np.zeros((1, 8), np.float32), value])[0])


@pytest.mark.parametrize("name", ["timestep", "time_ids", "guidance"])
@pytest.mark.parametrize("make", [as_a_unet, as_a_transformer])
def test_phases_are_those_of_float32(make: Any, name: str, tmp_path: Path) -> None:
    timestep = 813 if make is as_a_unet else 0.813
    wanted = run(make(name), "f32", timestep)
    model = make(name)
    assert keep_phases(model)
    assert not keep_phases(model), "once is enough"
    np.testing.assert_allclose(run(model, "f32", timestep), wanted, atol=1e-5)
    ov.save_model(model, tmp_path / "x.xml", compress_to_fp16=False)
    for each in (model, model.clone(), core().read_model(tmp_path / "x.xml")):
        assert sum(MARK in op.get_rt_info() for op in each.get_ops()) > 1
        if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            off = np.abs(run(each, "bf16", timestep) - wanted).max() / np.abs(wanted).max()
            assert off < 0.02, "without the marks it is a tenth and more"


def test_what_is_no_timestep_is_left_alone() -> None:
    assert not keep_phases(as_a_transformer("hidden"))
    bundle = ModelBundle()
    bundle.models["unet"] = as_a_transformer("hidden")
    assert ExactTimesteps().apply(bundle).notes


def test_the_embedded_model_has_exact_phases() -> None:
    pipeline = Pipeline("text-to-image", source="package:ovforge_lcm/model", cache=None)
    model = pipeline.bundle.models["unet"]
    products = [op for op in model.get_ops() if op.get_type_name() in ("Sin", "Cos")]
    assert products
    assert all(MARK in op.input(0).get_source_output().get_node().get_rt_info() for op in products)
    assert "unet: phases of timesteps stay in float32" in [
        line for report in pipeline.reports for line in report.applied
    ]
