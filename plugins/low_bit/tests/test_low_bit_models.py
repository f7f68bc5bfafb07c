"""What becomes of models: the graphs compute what the numbers say, and what cannot be done is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from openvino import opset13 as ops

import ovforge
import ovforge_low_bit
from ovforge import Use, testing
from ovforge.contracts.stages import Report
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.runtime import core
from ovforge.model.sources import FileSource
from ovforge_low_bit.activations import rows, statistics
from ovforge_low_bit.integers import nearest
from ovforge_low_bit.layers import Layer, find_layers
from ovforge_low_bit.low_rank import factors
from ovforge_low_bit.options import ScopeOptions
from ovforge_low_bit.power import nearest_powers
from ovforge_low_bit.softmax import quantized_softmaxes

EMBEDDED = "package:ovforge_lcm/model"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
Array = NDArray[Any]


def weights(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def held(array: Array, kind: str = "f32") -> Any:
    """Return weights as converters leave them: in 16 bits, with a conversion."""
    constant = ops.constant(array, getattr(ov.Type, kind))
    return constant if kind == "f32" else ops.convert(constant, "f32")


def model(kind: str = "f16") -> ov.Model:
    """Return two products, one of each orientation, and a convolution with strides, dilation and uneven padding."""
    x = ops.parameter([-1, 64], np.float32, name="x")
    first = ops.matmul(x, held(weights(96, 64), kind), False, True, name="first")
    second = ops.matmul(ops.gelu(first, "erf"), held(weights(96, 128, seed=1), kind), False, False, name="second")
    picture = ops.reshape(second, ops.constant(np.array([-1, 8, 4, 4])), False)
    kernel = held(weights(16, 8, 3, 2, seed=2), kind)
    out = ops.convolution(picture, kernel, [1, 2], [1, 0], [2, 1], [2, 1], name="third")
    made = ov.Model([out], [x], "three")
    made.inputs[0].get_tensor().set_names({"x"})
    made.outputs[0].get_tensor().set_names({"y"})
    return made


def bundle(make: Callable[[], ov.Model] = model) -> ModelBundle:
    made = ModelBundle()
    made.models["unet"] = make()
    made.models["tokenizer"] = testing.small_model()
    return made


class Recorded:
    """Recorded inputs, drawn from a seed."""

    def __init__(self, shape: tuple[int, ...] = (6, 64), name: str = "x") -> None:
        self.shape, self.name = shape, name
        self.asked = 0

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Array]]:
        self.asked += 1
        return [{self.name: weights(*self.shape, seed=100 + n)} for n in range(count)]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        raise AssertionError("no method here looks at results")


def quantize(name: str, changed: ModelBundle, calibration: Any = None, keep: Any = None, **options: Any) -> Report:
    described = testing.extension(ovforge_low_bit, "quantizer", name)
    stage = described.create(described.options_model()(**options))  # type: ignore[misc]
    report: Report = stage.quantize(changed, calibration or Recorded(), keep or {})
    return report


def run(made: ov.Model, x: Array) -> Array:
    return np.asarray(core().compile_model(made, "CPU", EXACT)(x)[0])


def layers_of(made: ov.Model) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(made, ScopeOptions(), (), Report())}


def rebuilt(change: Callable[[Array], Array], kind: str = "f16") -> ov.Model:
    """Return the model with each weight matrix replaced by `change` of it, in plain float32."""
    made = model(kind)
    for layer in layers_of(made).values():
        matrix = change(layer.matrix())
        layer.set_weights(ops.constant((matrix.T if layer.is_transposed else matrix).reshape(layer.shape)).output(0))
    return made


CASES: list[tuple[str, dict[str, Any], Callable[[Array], Array]]] = [
    ("auto-round", {"iterations": 0, "bits": bits, "symmetric": symmetric, "group_size": group},
     lambda w, bits=bits, symmetric=symmetric, group=group: nearest(w, bits, symmetric, group).matrix())  # type: ignore[misc]
    for bits, symmetric, group in [
        (2, False, 32), (2, True, 16), (3, False, -1), (3, True, 16), (4, False, 32), (4, True, -1), (8, False, 16),
    ]
]  # fmt: skip
CASES += [
    ("auto-round", {"iterations": 0, "bits": 3, "packed": True}, lambda w: nearest(w, 3, False, 64).matrix()),
    ("auto-round", {"iterations": 0, "bits": 3, "packed": True, "symmetric": True, "group_size": 16},
     lambda w: nearest(w, 3, True, 16).matrix()),
    ("power-quant", {"exponent": 0.6, "group_size": 16}, lambda w: nearest_powers(w, 0.6, 4, 16).matrix()),
    ("power-quant", {"exponent": 0.8, "bits": 3}, lambda w: nearest_powers(w, 0.8, 3, 64).matrix()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "change"), CASES)
def test_the_graph_computes_what_the_numbers_say(
    name: str, options: dict[str, Any], change: Callable[[Array], Array], tmp_path: Path
) -> None:
    changed = bundle()
    report = quantize(name, changed, **options)
    assert report.layers == {"unet": ["first", "second", "third"]}
    assert report.bytes_after is not None and report.bytes_before is not None
    assert report.bytes_after < 0.75 * report.bytes_before
    x = weights(5, 64, seed=9)
    wanted = run(rebuilt(change), x)
    size = np.abs(wanted).max()
    assert np.abs(run(changed.models["unet"], x) - wanted).max() < 1e-5 * size
    # And after a round trip through files.
    changed.save(tmp_path / "saved")
    again = ModelBundle.open(FileSource(tmp_path / "saved"))
    assert np.abs(run(again.models["unet"], x) - wanted).max() < 1e-5 * size


@pytest.mark.parametrize("factor_type", ["f16", "i8"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_branches_add_their_product(factor_type: str, kind: str) -> None:
    def corrected(matrix: Array) -> Array:
        quantized = nearest(matrix, 3, False, 32).matrix()
        up, down = factors(matrix - quantized, 5)
        if factor_type == "i8":
            up, down = (nearest(factor, 8, True, -1).matrix() for factor in (up, down))
        return quantized + up @ down

    changed = bundle(lambda: model(kind))
    report = quantize("lorc", changed, bits=3, group_size=32, rank=5, factors=factor_type)
    assert "rank 5" in report.applied[0]
    x = weights(5, 64, seed=9)
    wanted = run(rebuilt(corrected, kind), x)
    assert np.abs(run(changed.models["unet"], x) - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert changed.models["unet"].outputs[0].get_names() == {"y"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auto-round", {"iterations": 10, "samples": 2}),
        ("auto-round", {"iterations": 0, "bits": 2}),
        ("lorc", {"rank": 3}),
        ("power-quant", {}),
        ("power-quant", {"search": "layer", "iterations": 10, "samples": 2}),
        ("wanda", {"share": 0.3, "samples": 2}),
        ("wanda", {"pattern": "2:4", "samples": 2}),
        ("softmax-bias", {}),
    ],
)
def test_quantizers_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    testing.check_quantizer(ovforge_low_bit, name, options, bundle, Recorded())


def test_the_plugin_keeps_the_contract() -> None:
    testing.check_plugin(ovforge_low_bit)


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"), [(4, False, "u4"), (4, True, "i4"), (3, True, "i4"), (2, False, "u2")]
)
def test_products_keep_their_weights_small_while_they_run(bits: int, symmetric: bool, kind: str) -> None:
    x = ops.parameter([-1, 512], np.float32, name="x")
    made = ov.Model([ops.matmul(x, held(weights(512, 512), "f16"), False, True)], [x])
    changed = bundle(lambda: made)
    quantize("auto-round", changed, iterations=0, bits=bits, symmetric=symmetric)
    compiled = core().compile_model(changed.models["unet"], "CPU", EXACT)
    large = {
        op.get_output_element_type(0).get_type_name()
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "Const" and list(op.get_output_shape(0)) == [512, 512]
    }
    assert large == {kind}


# -- statistics of inputs -----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    automatic=st.sampled_from(["explicit", "valid", "same_upper", "same_lower"]),
)
def test_unfolded_rows_times_the_matrix_are_the_convolution(
    kernel: Any, strides: Any, dilations: Any, pads: Any, automatic: str
) -> None:
    x = ops.parameter([2, 3, 9, 8], np.float32, name="x")
    kernel_ = ops.constant(weights(4, 3, *kernel))
    out = ops.convolution(x, kernel_, strides, pads[:2], pads[2:], dilations, automatic)
    made = ov.Model([out], [x])
    (layer,) = layers_of(made).values()
    data = weights(2, 3, 9, 8, seed=5)
    wanted = run(made, data)
    ours = rows(layer, data) @ layer.matrix().T
    ours = ours.reshape(2, *wanted.shape[2:], 4).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, False), (True, True), (True, False)])
def test_rows_times_the_matrix_are_the_product(transpose_a: bool, transpose_b: bool) -> None:
    x = ops.parameter([3, 6, 6], np.float32, name="x")
    matrix = weights(*((5, 6) if transpose_b else (6, 5)))
    made = ov.Model([ops.matmul(x, ops.constant(matrix), transpose_a, transpose_b)], [x])
    (layer,) = layers_of(made).values()
    data = weights(3, 6, 6, seed=5)
    np.testing.assert_allclose((rows(layer, data) @ layer.matrix().T).reshape(3, 6, 5), run(made, data), atol=1e-5)


def test_sums_are_over_what_layers_are_given() -> None:
    """In one part or many, shared or not, Gram matrices are X^T X of the layer's own input, and squares its diagonal."""
    made = model("f32")
    records = Recorded().inputs("unet", 3)
    layers = list(layers_of(made).values())
    first = np.concatenate([record["x"] for record in records])
    whole = {group[0].name: sums for group, sums in statistics(made, layers, records, "gram")}
    parts = {group[0].name: sums for group, sums in statistics(made, layers, records, "gram", memory=1)}
    squares = {group[0].name: sums for group, sums in statistics(made, layers, records, "squares")}
    np.testing.assert_allclose(whole["first"], first.T @ first / len(first), rtol=1e-4, atol=1e-5)
    for name in ("first", "second", "third"):
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.diag(whole[name]), squares[name], rtol=1e-4)
    assert made.outputs[0].get_names() == {"y"} and len(made.outputs) == 1


def test_learned_rounding_lowers_the_error_of_the_whole_model() -> None:
    x = weights(50, 64, seed=9)
    exact = run(model(), x)
    errors = []
    for iterations in (0, 100):
        changed, calibration = bundle(), Recorded((50, 64))
        quantize("auto-round", changed, calibration, bits=3, group_size=-1, iterations=iterations, types=["MatMul"])
        errors.append(float(np.linalg.norm(run(changed.models["unet"], x) - exact)))
        assert calibration.asked == bool(iterations)
    assert errors[1] < 0.95 * errors[0]


def test_layers_too_wide_to_learn_are_rounded_to_the_nearest() -> None:
    for name, options, plain in (
        ("auto-round", {"iterations": 20}, lambda w: nearest(w, 4, False, 64).matrix()),
        ("power-quant", {"iterations": 20, "exponent": 0.7}, lambda w: nearest_powers(w, 0.7, 4, 64).matrix()),
    ):
        changed = bundle()
        report = quantize(name, changed, samples=2, max_width=1, **options)  # type: ignore[arg-type]
        assert report.notes == ["unet: 3 operations have over 1 inputs, and are not learned"]
        x = weights(5, 64, seed=9)
        wanted = run(rebuilt(plain), x)
        assert np.abs(run(changed.models["unet"], x) - wanted).max() < 1e-5 * np.abs(wanted).max()
        changed = bundle()
        report = quantize(name, changed, samples=2, max_width=64, **options)  # type: ignore[arg-type]
        assert report.notes == ["unet: 1 operations have over 64 inputs, and are not learned"]
        assert np.abs(run(changed.models["unet"], x) - wanted).max() > 1e-3 * np.abs(wanted).max()
    changed = bundle()
    report = quantize("power-quant", changed, samples=2, max_width=64, search="layer")
    assert report.layers == {"unet": ["first", "second", "third"]}


# -- pruning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_pruned_weights_are_zeros_and_others_as_they_were(kind: str) -> None:
    changed = bundle(lambda: model(kind))
    quantize("wanda", changed, pattern="2:4", samples=2)
    before, after = layers_of(model(kind)), layers_of(changed.models["unet"])
    for name, layer in after.items():
        assert layer.constant.get_element_type() == before[name].constant.get_element_type()
        now, then = layer.matrix(), before[name].matrix()
        assert ((now == then) | (now == 0)).all()
        if layer.is_convolution:  # four channels at one place of the kernel
            now = np.moveaxis(now.reshape(layer.shape), 1, -1)
        assert ((now.reshape(-1, 4) == 0).sum(-1) == 2).all()


def test_channels_that_are_not_in_fours_are_skipped() -> None:
    def odd() -> ov.Model:
        x = ops.parameter([1, 3, 8, 8], np.float32, name="x")
        return ov.Model([ops.convolution(x, held(weights(4, 3, 3, 3)), [1, 1], [0, 0], [0, 0], [1, 1], name="c")], [x])

    changed = bundle(odd)
    report = quantize("wanda", changed, Recorded((1, 3, 8, 8)), pattern="2:4")
    assert [skip.item for skip in report.skipped] == ["c", "unet"]
    assert "its 3 inputs are not a multiple of 4" in report.skipped[0].reason
    assert not report.roles


# -- softmax bias -------------------------------------------------------------------------------------------------------


def attention(quantized: bool = True) -> ov.Model:
    """Return softmax rows of 64 in two heads, in 8 bits: their many small probabilities become 0."""
    x = ops.parameter([1, 2, 16, 64], np.float32, name="x")
    sharper = ops.multiply(x, ops.constant(np.array([2, 4], np.float32).reshape(1, 2, 1, 1)))
    probabilities = ops.softmax(sharper, 3)
    if quantized:
        low, high = (ops.constant(np.float32(end)) for end in (0, 1))
        probabilities = ops.fake_quantize(probabilities, low, high, low, high, 256, name="quantized")
    made = ov.Model([ops.add(probabilities, ops.constant(np.float32(0)))], [x])
    made.inputs[0].get_tensor().set_names({"x"})
    return made


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_quantized_rows_sum_to_one_again(granularity: str) -> None:
    calibration = Recorded((1, 2, 16, 64))
    records = [record["x"] for record in calibration.inputs("unet", 4)]
    exact, rounded = ([run(attention(kind), x) for x in records] for kind in (False, True))
    changed = bundle(attention)
    report = quantize("softmax-bias", changed, calibration, samples=4, granularity=granularity)
    assert report.layers == {"unet": ["quantized"]}
    axes = (0, 2, 3) if granularity == "head" else (0, 1, 2, 3)
    # The paper's formula: what a row lacks to 1, spread over its 64 probabilities, on average.
    beta = np.mean([(1 - y.sum(-1, keepdims=True)).mean(axes, keepdims=True) / 64 for y in rounded], axis=0)
    for x, before in zip(records, rounded, strict=True):
        np.testing.assert_allclose(run(changed.models["unet"], x), before + beta, atol=1e-6)
    means = [np.mean(sums) for sums in (np.stack(rounded).sum(-1), np.stack(exact).sum(-1))]
    assert means[0] < 0.995 and means[1] == pytest.approx(1, abs=1e-4)
    assert np.mean([run(changed.models["unet"], x).sum(-1) for x in records]) == pytest.approx(1, abs=1e-4)


def test_without_quantized_softmax_the_reason_is_said() -> None:
    def fused() -> ov.Model:
        parts = [ops.parameter([1, 2, 4, 8], np.float32) for _ in range(3)]
        return ov.Model([ops.scaled_dot_product_attention(*parts)], parts)

    for make, reason in (
        (lambda: attention(False), "quantize activations first"),
        (fused, "inside ScaledDotProductAttention"),
        (model, "it has no softmax"),
    ):
        report = quantize("softmax-bias", bundle(make))
        assert not report.roles and reason in report.skipped[0].reason


def test_nncfs_quantized_softmax_is_found() -> None:
    nncf = pytest.importorskip("nncf")
    x = ops.parameter([1, 2, 16, 64], np.float32, name="x")
    probabilities = ops.softmax(ops.multiply(x, ops.constant(np.float32(4))), 3)
    values = ops.reshape(ops.relu(x), ops.constant(np.array([1, 2, 64, 16])), False)
    made = ov.Model([ops.matmul(probabilities, values, False, False)], [x])
    made.inputs[0].get_tensor().set_names({"x"})
    data = nncf.Dataset(Recorded((1, 2, 16, 64)).inputs("unet", 4))
    quantized = nncf.quantize(made, data, subset_size=4)
    assert len(quantized_softmaxes(quantized)) == 1


# -- what is refused, skipped, kept --------------------------------------------------------------------------------------


def test_layers_are_kept_as_asked() -> None:
    changed = bundle()
    report = quantize(
        "auto-round", changed, keep={"unet": ["second"]}, iterations=0, types=["MatMul"], ignored_patterns=["thi.*"]
    )
    assert report.layers == {"unet": ["first"]}
    assert not report.skipped
    assert report.notes == ["left as they are, as asked: 2 operations"]
    untouched = layers_of(changed.models["unet"])
    assert set(untouched) == {"second", "third"}


def test_places_times_frequencies_are_no_layer() -> None:
    """As rotary positions are computed: frequencies in few bits would turn tokens by another angle, or not at all."""
    places = ops.parameter([-1, 1], np.float32, name="places")
    angles = ops.matmul(places, ops.constant(weights(1, 64)), False, False, name="angles")
    out = ops.matmul(ops.cos(angles), ops.constant(weights(8, 64)), False, True, name="linear")
    changed = bundle(lambda: ov.Model([out], [places]))
    report = quantize("auto-round", changed, iterations=0)
    assert report.layers == {"unet": ["linear"]}
    assert not report.skipped


def test_weights_that_cannot_be_changed_are_skipped_with_the_reason() -> None:
    x = ops.parameter([2, 4, 8], np.float32, name="x")
    shared = ops.constant(weights(8, 8))
    stacked = ops.matmul(x, ops.constant(weights(2, 8, 8)), False, False, name="stacked")
    twice = [ops.matmul(stacked, shared, False, flag, name=f"shared{flag}") for flag in (False, True)]
    left = ops.matmul(ops.constant(weights(4, 4)), ops.add(*twice), False, False, name="left")
    computed = ops.multiply(ops.constant(weights(8, 8)), ops.constant(np.float32(2)))
    out = ops.matmul(left, computed, False, False, name="computed")
    activations = ops.matmul(out, x, False, True, name="activations")
    changed = bundle(lambda: ov.Model([activations], [x]))
    report = quantize("auto-round", changed, iterations=0)
    said = {skip.item: skip.reason for skip in report.skipped}
    assert set(said) == {"stacked", "sharedFalse", "sharedTrue", "left", "computed", "unet"}
    for item, part in {
        "stacked": "3 axes",
        "sharedTrue": "shared",
        "left": "left side",
        "computed": "computed",
    }.items():
        assert part in said[item]
    again = bundle()
    quantize("auto-round", again, iterations=0)
    report = quantize("lorc", again)
    assert "quantized already" in report.skipped[0].reason and not report.roles


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("auto-round", {"roles": ["unett"]}, "Did you mean 'unet'"),
        ("auto-round", {"iterations": 0, "ignored": ["frist"]}, "Did you mean 'first'"),
    ],
)
def test_what_is_not_there_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(name, bundle(), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("auto-round", {"bits": 5}, "bits"),
        ("auto-round", {"bits": 4, "packed": True}, "packed is for 3 bits"),
        ("auto-round", {"group_size": 0}, "group_size is -1"),
        ("auto-round", {"ignored_patterns": ["("]}, "is not a regular expression"),
        ("auto-round", {"types": []}, "types"),
        ("lorc", {"rank": 0}, "rank"),
        ("power-quant", {"exponent": 0.5, "search": "layer"}, "nothing to search"),
        ("wanda", {"pattern": "2:4", "share": 0.3}, "2:4 zeroes the half"),
    ],
)
def test_options_that_do_not_go_together_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ovforge.Pipeline("text-to-image", source=EMBEDDED, quantize=[Use(name, **options)], cache=None)
    assert message in str(raised.value)


def test_bad_numbers_are_said() -> None:
    broken = weights(8, 64)
    broken[3, 3] = np.nan

    def bad() -> ov.Model:
        x = ops.parameter([-1, 64], np.float32, name="x")
        return ov.Model([ops.matmul(x, ops.constant(broken), False, True, name="bad")], [x])

    with pytest.raises(ModelError, match="infinities or NaN") as raised:
        quantize("auto-round", bundle(bad), iterations=0)
    assert raised.value.where == "bad"

    class Overflowing(Recorded):
        def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Array]]:
            return [{"x": np.full((6, 64), np.inf, "f4")}]

    with pytest.raises(ModelError, match="recorded inputs hold infinities"):
        quantize("wanda", bundle(), Overflowing())

    class Empty(Recorded):
        def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Array]]:
            return []

    with pytest.raises(ModelError, match="no inputs were recorded"):
        quantize("wanda", bundle(), Empty())


def test_pictures_are_made_with_it() -> None:
    """In a pipeline, calibrated by it: pictures differ from the exact ones, and not by much."""
    options: dict[str, Any] = {"source": EMBEDDED, "device": Use("cpu", precision="f32"), "cache": None}
    prompt = "a beautiful pink unicorn, 8k"
    plain = ovforge.Pipeline("text-to-image", **options)(prompt, seed=7).images[0]
    steps = [
        Use("auto-round", roles=["unet"], types=["MatMul"], samples=2, iterations=1),
        Use("power-quant", roles=["text_encoder"]),
    ]
    pipe = ovforge.Pipeline("text-to-image", quantize=steps, calibration={"samples": 4, "runs": 1}, **options)
    assert [[*report.layers] for report in pipe.reports if report.layers] == [["unet"], ["text_encoder"]]
    ours = pipe(prompt, seed=7).images[0]
    assert 0 < np.abs(np.asarray(ours, "f4") - np.asarray(plain, "f4")).mean() < 25
