"""Values beyond float16's range: found by what is recorded, divided, and the same numbers in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from openvino import opset13 as ops

import ovforge
from ovforge import Use
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge.model.runtime import core
from ovforge_low_bit.half_range import LARGEST, HalfRange, peaks
from ovforge_low_bit.options import HalfRangeOptions

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
WIDTH = 32
Array = NDArray[Any]


def drawn(*shape: int, seed: int = 0, times: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * times).astype(np.float32)


def weights(*shape: int, seed: int = 0, times: float = 1.0) -> Any:
    """As converters leave them: in 16 bits, with a conversion, or in float32 if they are too large."""
    if times > 1000:
        return ops.constant(drawn(*shape, seed=seed, times=times))
    return ops.convert(ops.constant(drawn(*shape, seed=seed, times=times).astype(np.float16)), "f32")


def layer_norm(x: Any) -> Any:
    return ops.mvn(x, ops.constant(np.array([2])), True, 1e-5, "inside_sqrt")


def rms_norm(x: Any) -> Any:
    mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), True)
    root = ops.sqrt(ops.add(mean, np.float32(1e-6)))
    return ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))


def rsqrt_norm(x: Any) -> Any:
    mean = ops.reduce_mean(ops.multiply(x, x), np.array([-1]), True)
    return ops.multiply(ops.power(ops.add(mean, np.float32(1e-6)), np.float32(-0.5)), x)


def group_norm(x: Any) -> Any:
    planes = ops.transpose(x, np.array([0, 2, 1]))
    ones, zeros = (ops.constant(np.full(WIDTH, value, np.float32)) for value in (1, 0))
    normal = ov.opset12.group_normalization(planes, ones, zeros, 4, 1e-6)
    return ops.transpose(normal, np.array([0, 2, 1]))


NORMS = {"layer": layer_norm, "rms": rms_norm, "rsqrt": rsqrt_norm, "group": group_norm}


def transformer(norm: Any, times: float, blocks: int = 2) -> ov.Model:
    """Residual blocks of attention and a gated layer behind a norm, whose residual stream is `times` as large."""
    x = ops.parameter([-1, 8, WIDTH], np.float32, name="x")
    gate = ops.parameter([-1, WIDTH], np.float32, name="gate")
    stream = ops.matmul(x, weights(WIDTH, WIDTH, seed=9, times=times), False, True)
    for block in range(blocks):
        normal = norm(stream)
        q, k, v = (
            ops.unsqueeze(ops.matmul(normal, weights(WIDTH, WIDTH, seed=block * 10 + n, times=0.2), False, True), 1)
            for n in range(3)
        )
        mixed = ops.squeeze(ov.opset13.scaled_dot_product_attention(q, k, v), np.array([1]))
        out = ops.matmul(mixed, weights(WIDTH, WIDTH, seed=block * 10 + 4, times=times), False, True)
        stream = ops.add(stream, ops.multiply(out, ops.unsqueeze(gate, 1)))
        hidden = ops.gelu(ops.matmul(norm(stream), weights(64, WIDTH, seed=block * 10 + 5), False, True), "erf")
        both = ops.variadic_split(hidden, 2, np.array([WIDTH, WIDTH]))
        wide = ops.concat([ops.multiply(both.output(0), both.output(1)), hidden], 2)
        stream = ops.add(stream, ops.matmul(wide, weights(WIDTH, 96, seed=block * 10 + 6, times=times), False, True))
    last = ops.matmul(norm(stream), weights(4, WIDTH, seed=99), False, True)
    model = ov.Model([ops.result(last)], [x, gate], "blocks")
    model.outputs[0].get_tensor().set_names({"y"})
    return model


class Recorded:
    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Array]]:
        return [{"x": drawn(2, 8, WIDTH, seed=n), "gate": drawn(2, WIDTH, seed=50 + n)} for n in range(min(count, 2))]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        raise AssertionError("nothing is judged")


def bundle_of(model: ov.Model) -> ModelBundle:
    bundle = ModelBundle()
    bundle.models["transformer"] = model
    return bundle


def run(model: ov.Model, hints: Mapping[str, str] = EXACT) -> Array:
    compiled = core().compile_model(model, "CPU", dict(hints))
    result: Array = compiled.create_infer_request().infer(dict(Recorded().inputs("", 1)[0]))["y"]
    return result


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=4)
@given(times=st.sampled_from([0.1, 300.0, 2e3, 3e4]))
def test_all_values_fit_and_results_stay(norm: str, times: float) -> None:
    model = transformer(NORMS[norm], times)
    wanted, records = run(model), Recorded().inputs("", 2)
    before = peaks(model, records, "transformer")
    bundle = bundle_of(model)
    report = HalfRange(HalfRangeOptions()).quantize(bundle, Recorded())
    changed = bundle.models["transformer"]
    if max(before.values()) <= LARGEST / 8:
        assert changed is model
        assert not report.applied
        assert "left as it is" in report.notes[0]
        return
    after = peaks(changed, records, "transformer")
    large = {port: peak for port, peak in after.items() if peak > LARGEST / 8 * 1.001}
    assert not large, "nothing here needs a large value itself"
    assert report.layers["transformer"]
    np.testing.assert_allclose(run(changed), wanted, atol=1e-4 * np.abs(wanted).max())


def test_on_a_device_that_computes_in_float16() -> None:
    """Where the CPU does, the model as it was gives no numbers, and the changed one gives them."""
    if "FP16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not compute in float16")
    model = transformer(layer_norm, 5e3)
    wanted, hints = run(model), {"INFERENCE_PRECISION_HINT": "f16"}
    assert not np.isfinite(run(model, hints)).all()
    bundle = bundle_of(model)
    HalfRange(HalfRangeOptions()).quantize(bundle, Recorded())
    assert np.abs(run(bundle.models["transformer"], hints) - wanted).max() <= 0.01 * np.abs(wanted).max()


def test_what_needs_the_value_itself_is_said() -> None:
    x = ops.parameter([-1, 4], np.float32, name="x")
    gate = ops.parameter([-1, 4], np.float32, name="gate")
    large = ops.multiply(x, ops.constant(np.float32(1e6)), name="large")
    out = ops.add(ops.softmax(ops.sin(large), 1), gate)
    model = ov.Model([ops.result(out)], [x, gate], "sine")
    model.outputs[0].get_tensor().set_names({"y"})

    class Few(Recorded):
        def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Array]]:
            return [{"x": drawn(2, 4), "gate": drawn(2, 4, seed=1)}]

    bundle = bundle_of(model)
    report = HalfRange(HalfRangeOptions()).quantize(bundle, Few())
    assert any("1 operations still leave" in note for note in report.notes), report.notes


def test_a_model_that_is_broken_in_float32_is_refused() -> None:
    model = transformer(rms_norm, 1.0)
    constant = next(op for op in model.get_ops() if op.get_type_name() == "Constant" and op.get_byte_size() > 1000)
    broken = np.array(constant.get_data())
    broken[0, 0] = np.inf
    for port in list(constant.output(0).get_target_inputs()):
        port.replace_source_output(ops.constant(broken).output(0))
    with pytest.raises(ModelError, match="even in float32"):
        HalfRange(HalfRangeOptions()).quantize(bundle_of(model), Recorded())


def test_in_a_pipeline_that_needs_it_and_in_one_that_does_not() -> None:
    """The embedded model stays as it is; with no headroom at all to spare, its pictures stay."""
    device = Use("cpu", precision="f32")
    plain = ovforge.Pipeline("text-to-image", source="package:ovforge_lcm/model", device=device)
    fits = ovforge.Pipeline(
        "text-to-image", source="package:ovforge_lcm/model", device=device, quantize=["f16-range"],
        calibration={"runs": 1},
    )  # fmt: skip
    wanted = plain("a red car", seed=1).images[0]
    assert np.array_equal(np.asarray(fits("a red car", seed=1).images[0]), np.asarray(wanted))
    narrow = ovforge.Pipeline(
        "text-to-image", source="package:ovforge_lcm/model", device=device,
        quantize=[Use("f16-range", headroom=4096)], calibration={"runs": 1},
    )  # fmt: skip
    made = narrow("a red car", seed=1).images[0]
    difference = np.abs(np.asarray(made, np.int16) - np.asarray(wanted, np.int16))
    assert difference.max() <= 2
    assert "divided by" in " ".join(line for report in narrow.reports for line in report.applied)
