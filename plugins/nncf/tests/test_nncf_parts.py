"""Parts of diffusion transformers: found by structure, places exact in every quantizer, scopes that name parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

import ovforge_nncf
from ovforge import testing
from ovforge.config.options import validate_options
from ovforge.contracts.stages import Report
from ovforge.errors import ConfigError
from ovforge.model.bundle import ModelBundle
from ovforge_nncf.graph import lowered
from ovforge_nncf.parts import PARTS, parts_of, positions_of

WIDTH, HEAD = 64, 16


def transformer(*, outer: bool = True) -> ov.Model:
    """Return a denoiser of one block, named by numbers: rotary positions, a step's sines, adaptive layer norm.

    `layer.N` are its layers in order: the step's two, the modulation, the sample's, query, key, value, out, last.
    """
    rng, layers = np.random.default_rng(0), iter(range(99))
    sample = ops.parameter([-1, -1, 32], np.float32, name="a")
    step = ops.parameter([-1], np.float32, name="b")
    places = ops.parameter([-1, 1], np.float32, name="c")

    def linear(value: Any, out: int, inner: int) -> Any:
        weights = ops.constant((rng.normal(size=(out, inner)) / np.sqrt(inner)).astype(np.float32))
        made = ops.matmul(value, weights, False, True)
        made.set_friendly_name(f"layer.{next(layers)}")
        return made

    steps = ops.multiply(ops.unsqueeze(step, ops.constant([1])), ops.constant(np.float32([[1000, 77.7, 6.1, 0.3]])))
    time = linear(ops.concat([ops.cos(steps), ops.sin(steps)], 1), WIDTH, 8)
    time = linear(ops.swish(time), WIDTH, WIDTH)
    made = ops.unsqueeze(linear(ops.swish(time), 2 * WIDTH, WIDTH), ops.constant([1]))
    shift, scale = ops.split(made, ops.constant(2), 2).outputs()

    frequencies = (1000.0 ** -(np.arange(HEAD // 2) / 8)).astype(np.float32)[None]
    angles = (ops.matmul(places, ops.constant(frequencies), False, False)) if outer else (
        ops.multiply(places, ops.constant(frequencies))
    )  # fmt: skip
    angles = ops.unsqueeze(ops.concat([angles, angles], 1), ops.constant([0, 1]))
    cosines, sines = ops.cos(angles), ops.sin(angles)

    def rotated(value: Any) -> Any:
        value = ops.reshape(value, ops.constant([0, 0, -1, HEAD]), True)
        value = ops.transpose(value, ops.constant([0, 2, 1, 3]))
        halves = ops.split(value, ops.constant(3), 2).outputs()
        turned = ops.concat([ops.multiply(halves[1], ops.constant(np.float32(-1))), halves[0]], 3)
        return ops.add(ops.multiply(value, cosines), ops.multiply(turned, sines))

    hidden = linear(sample, WIDTH, 32)
    normal = ops.mvn(hidden, ops.constant([2]), True, 1e-5, "inside_sqrt")
    normal = ops.add(ops.multiply(normal, ops.add(scale, ops.constant(np.float32(1)))), shift)
    query, key = rotated(linear(normal, WIDTH, WIDTH)), rotated(linear(normal, WIDTH, WIDTH))
    value = ops.reshape(linear(normal, WIDTH, WIDTH), ops.constant([0, 0, -1, HEAD]), True)
    seen = ops.scaled_dot_product_attention(query, key, ops.transpose(value, ops.constant([0, 2, 1, 3])))
    seen = ops.reshape(ops.transpose(seen, ops.constant([0, 2, 1, 3])), ops.constant([0, 0, -1]), True)
    hidden = ops.add(hidden, linear(seen, WIDTH, WIDTH))
    model = ov.Model([linear(hidden, 32, WIDTH)], [sample, step, places], "numbers")
    for port, name in zip(model.inputs, "abc", strict=True):
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({"out"})
    return model


def records(count: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "a": rng.normal(size=(2, 12, 32)).astype(np.float32),
            "b": rng.random(2).astype(np.float32),
            "c": np.arange(12, dtype=np.float32)[:, None] * 5,
        }
        for _ in range(count)
    ]


class Recorded:
    def inputs(self, role: str, count: int) -> list[dict[str, Any]]:
        return records()[:count]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        raise AssertionError


def quantize(
    name: str, options: dict[str, Any], keep: Mapping[str, list[str]] = {}, **roles: ov.Model
) -> tuple[ModelBundle, Report]:
    described = testing.extension(ovforge_nncf, "quantizer", name)
    checked = validate_options(described.options_model(), options, where=name)
    made = ModelBundle()
    made.models.update(roles or {"transformer": transformer()})
    report: Report = described.create(checked).quantize(made, Recorded(), keep)
    return made, report


def of_type(model: ov.Model, *kinds: str) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() in kinds]


def waves(model: ov.Model) -> list[Any]:
    """Return what all sines and cosines give for a record."""
    copy = model.clone()
    found = sorted((op.get_friendly_name(), op.output(0)) for op in of_type(copy, "Sin", "Cos"))
    compiled = ov.Core().compile_model(
        ov.Model([port for _, port in found], copy.get_parameters(), "waves"),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    given = records(1)[0]
    result = compiled({port.any_name: given[port.any_name] for port in compiled.inputs})
    return [result[port] for port in compiled.outputs]


def precisions(model: ov.Model) -> dict[str, str | None]:
    return {op.name: op.weights for op in lowered(model)}


def same(ours: ov.Model, theirs: ov.Model) -> None:
    def contents(model: ov.Model) -> list[bytes]:
        return sorted(op.get_tensor_view().data.tobytes() for op in of_type(model, "Constant"))

    assert contents(ours) == contents(theirs)
    for record in records(2):
        assert np.array_equal(testing.run(ours, record)["out"], testing.run(theirs, record)["out"])


@pytest.mark.parametrize("outer", [True, False])
def test_parts_are_found_by_structure(outer: bool) -> None:
    model = transformer(outer=outer)
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    found = parts_of(model)
    layers = {part: sorted(name for name in names if name.startswith("layer")) for part, names in found.items()}
    assert layers == {
        "positions": [], "embeddings": ["layer.0", "layer.1"], "modulation": ["layer.2"], "first": ["layer.3"],
        "last": ["layer.8"], "linear_attention": [], "depthwise": [],
    }  # fmt: skip
    assert set(layers) == set(PARTS)
    assert found["positions"] == positions_of(model)
    counted = [kinds[name] for name in found["positions"]]
    assert counted.count("Sin") == counted.count("Cos") == 2
    assert counted.count("MatMul") == outer
    assert counted.count("Multiply") == 1 + (not outer) + 2 * 3, "the step's, the places', and three of each rotation"
    assert counted.count("Add") == 2
    assert [kinds[name] for name in found["modulation"]].count("Multiply") == 1, "what the scale is applied by"


def test_what_is_no_denoiser_has_no_parts() -> None:
    words = ops.parameter([-1, -1], np.int64, name="words")
    table = ops.constant(np.ones((9, 8), np.float32))
    states = ops.matmul(
        ops.gather(table, words, ops.constant(0)), ops.constant(np.ones((8, 8), np.float32)), False, False
    )
    model = ov.Model([ops.sin(states)], [words], "sines of features")
    assert not any(parts_of(model).values())


@pytest.mark.parametrize("by", ["a row of ones", "a sum", "another number"])
def test_products_that_their_own_sums_divide(by: str) -> None:
    """The sum may be one more row of the product; a product that another one divides is none."""
    rng = np.random.default_rng(0)
    query, key, value = inputs = [ops.parameter([1, 8, 20], np.float32, name=name) for name in ("q", "k", "v")]
    above, one = ops.relu(key), ops.constant(np.ones((1, 1, 20), np.float32))
    scores = ops.matmul(ops.concat([value, one], 1), above, False, True)
    product = ops.matmul(scores, ops.relu(query), False, False)
    rows = ops.split(product, ops.constant(1), 9).outputs() if by != "a sum" else ()
    last = rows[8] if rows else ops.reduce_sum(product, ops.constant([1]), True)
    other = ops.matmul(ops.relu(query), above, False, True)
    if by == "another number":
        last = ops.reduce_sum(other, ops.constant([1, 2]), True)
    divided = ops.divide(ops.concat(rows[:8], 1) if rows else product, ops.add(last, ops.constant(np.float32(1e-6))))
    weights = ops.constant(rng.normal(size=(20, 20)).astype(np.float32))
    for name, op in (("scores", scores), ("product", product), ("other", other)):
        op.set_friendly_name(name)
    model = ov.Model([ops.matmul(divided, weights, False, False), other], inputs, "attention")
    wanted = set() if by == "another number" else {"scores", "product"}
    assert parts_of(model)["linear_attention"] == wanted


def test_convolutions_of_single_channels() -> None:
    image = ops.parameter([1, 8, 6, 6], np.float32, name="image")
    made, none, one = image, [0, 0], [1, 1]
    for name, groups in (("depthwise", 8), ("grouped", 4)):
        weights = ops.constant(np.ones((groups, 8 // groups, 8 // groups, 3, 3), np.float32))
        made = ops.group_convolution(made, weights, one, one, one, one)
        made.set_friendly_name(name)
    transposed = ops.constant(np.ones((8, 1, 2, 4, 4), np.float32))  # of each channel two
    made = ops.group_convolution_backprop_data(
        made, transposed, strides=[2, 2], pads_begin=none, pads_end=none, dilations=one
    )
    made.set_friendly_name("upsampling")
    assert parts_of(ov.Model([made], [image], "image"))["depthwise"] == {"depthwise", "upsampling"}


@pytest.mark.parametrize("options", [{}, {"model_type": "transformer"}, {"mode": "fp8_e4m3"}])
def test_places_and_steps_are_exact_if_activations_are_quantized(options: dict[str, Any]) -> None:
    alone = nncf.quantize(transformer(), nncf.Dataset(records()))
    assert any(not np.array_equal(*pair) for pair in zip(waves(alone), waves(transformer()), strict=True)), (
        "as NNCF does"
    )
    model = transformer()
    made, report = quantize("nncf-ptq", options, transformer=model)
    ours, exact = made.models["transformer"], positions_of(model)
    for found, wanted in zip(waves(ours), waves(model), strict=True):
        if options.get("model_type"):  # smoothing divides places and multiplies frequencies by one number
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, wanted)
    assert exact <= {op.get_friendly_name() for op in ours.get_ops()}
    for op in of_type(ours, "FakeQuantize", "FakeConvert"):
        users = [target.get_node().get_friendly_name() for target in op.output(0).get_target_inputs()]
        assert not exact & set(users)
    assert f"transformer: {len(exact)} operations that compute places and steps stay exact" in report.notes
    assert "transformer: as they were: 1 MatMul (computes places or steps)" in report.notes


def test_frequencies_are_no_weights() -> None:
    """Places times frequencies is a product with a constant, which NNCF by itself gives 8 bits."""
    model = transformer()
    [product] = [name for name in precisions(nncf.compress_weights(model.clone())) if not name.startswith("layer")]
    assert product in positions_of(model)
    made, report = quantize("nncf-weights", {}, transformer=model)
    assert set(report.layers["transformer"]) == {f"layer.{number}" for number in range(9)}
    for found, wanted in zip(waves(made.models["transformer"]), waves(model), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_backup_scope_is_two_steps_of_nncf() -> None:
    options = {"mode": "int4_sym", "group_size": 16, "all_layers": True, "group_size_fallback": "ignore"}
    scope = {"parts": ["embeddings", "modulation"], "names": ["layer.8"]}
    made, report = quantize(
        "nncf-weights",
        {**options, "backup_scope": scope, "backup_mode": "int8_sym", "ignored_scope": {"names": ["layer.1"]}},
        keep={"transformer": ["layer.4"]},
    )
    model = transformer()
    eight, exact = ["layer.0", "layer.2", "layer.8"], ["layer.1", "layer.4", *positions_of(model)]
    first = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=16, all_layers=True,
        ignored_scope=nncf.IgnoredScope(names=eight + exact),
    )  # fmt: skip
    second = nncf.compress_weights(
        first, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=nncf.IgnoredScope(names=exact)
    )
    same(made.models["transformer"], second)
    found = precisions(made.models["transformer"])
    assert {name for name, kind in found.items() if kind == "INT8"} == set(eight)
    assert {name for name, kind in found.items() if kind == "INT4"} == {f"layer.{number}" for number in (3, 5, 6, 7)}
    assert "transformer: in 8 bits, not int4_sym: layer.0 and 2 more (in backup_scope)" in report.notes


def test_a_backup_of_floats() -> None:
    options = {
        "mode": "fp4",
        "group_size": 32,
        "group_size_fallback": "ignore",
        "backup_scope": {"parts": ["modulation"]},
    }
    made, _ = quantize("nncf-weights", options)
    found = precisions(made.models["transformer"])
    assert found["layer.2"] == "FP8"
    assert found["layer.5"] == "FP4"


def test_recipes_are_nncfs_own_with_parts() -> None:
    made, report = quantize("transformer-int4", {"group_size": 16, "advanced": {"min_group_size": 8}})
    found = precisions(made.models["transformer"])
    assert {name for name, kind in found.items() if kind == "INT8"} == {f"layer.{number}" for number in (0, 1, 2, 3, 8)}
    assert set(found.values()) == {"INT8", "INT4"}
    model = transformer()
    made, report = quantize("transformer-ptq", {}, transformer=model)
    kept = set().union(*parts_of(model).values())
    same(
        made.models["transformer"],
        nncf.quantize(
            model, nncf.Dataset(records()), model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED, ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        ),
    )  # fmt: skip
    assert not {f"layer.{number}" for number in (0, 1, 2, 3, 8)} & set(report.layers["transformer"])
    assert {f"layer.{number}" for number in (4, 5, 6, 7)} <= set(report.layers["transformer"])


def test_patterns_of_roles() -> None:
    roles = {name: transformer() for name in ("text_encoder", "transformer", "text_encoder_3")}
    made, report = quantize("text-encoders-int8", {}, **roles)
    assert report.roles == ("text_encoder", "text_encoder_3")
    assert made.models["transformer"] is roles["transformer"]
    with pytest.raises(ConfigError, match=r"no 'text_encoder\*' to quantize"):
        quantize("text-encoders-int4", {}, transformer=transformer())
    with pytest.raises(ConfigError, match="no 'transformer' to quantize"):
        quantize("transformer-int4", {}, unet=transformer())


def test_a_model_without_parts() -> None:
    roles = {"transformer": testing.small_model()}
    with pytest.raises(ConfigError, match="no operation is in the part 'modulation', layers that make scales"):
        quantize("nncf-weights", {"ignored_scope": {"parts": ["modulation"]}}, **roles)
    with pytest.raises(ConfigError, match="backup_scope is for modes below 8 bits"):
        quantize("nncf-weights", {"backup_scope": {"parts": ["modulation"]}})
    with pytest.raises(ConfigError, match="backup_scope is what gets backup_mode, and that is none"):
        quantize("nncf-weights", {"mode": "nf4", "backup_mode": "none", "backup_scope": {"parts": ["last"]}})
    with pytest.raises(ConfigError, match="'last', 'linear_attention' or 'depthwise'"):
        quantize("nncf-ptq", {"ignored_scope": {"parts": ["middle"]}})
    with pytest.raises(ConfigError, match=r"Did you mean 'layer\.2'"):
        quantize("nncf-weights", {"mode": "nf4", "backup_scope": {"names": ["layer2"]}})
