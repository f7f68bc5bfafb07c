"""Quantizers with data against nncf used directly, what they report, and what they refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
from nncf.quantization import advanced_parameters as advanced
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from openvino import opset13 as ops

import ovforge
import ovforge_nncf
from ovforge import Use, testing
from ovforge.config.options import validate_options
from ovforge.contracts.stages import Report
from ovforge.errors import Cancelled, ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge_nncf import running, weights
from ovforge_nncf.graph import lowered
from ovforge_nncf.statistics import constant_results

EMBEDDED = "package:ovforge_lcm/model"
CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")

Arguments = Callable[[], dict[str, Any]]


def network() -> ov.Model:
    """Return two convolutions around attention to words, with an embedding's worth of matrices; any batch and size."""
    rng, width, words = np.random.default_rng(0), 64, 96

    def weight(*shape: int) -> Any:
        values = rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        values[0] *= 6  # outliers, as trained weights have
        return ops.convert(ops.constant(values.astype(np.float16)), "f32")

    def named(node: Any, name: str) -> Any:
        node.set_friendly_name(name)
        return node

    def linear(value: Any, name: str, out: int, inner: int) -> Any:
        return named(ops.matmul(value, weight(out, inner), False, True), name)

    sample = ops.parameter([-1, 4, -1, -1], np.float32, name="sample")
    text = ops.parameter([-1, 7, words], np.float32, name="text")
    first = named(ops.convolution(sample, weight(width, 4, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]), "conv_in")
    first = ops.add(first, ops.convert(ops.constant(rng.normal(size=(1, width, 1, 1)).astype(np.float16)), "f32"))
    hidden = ops.swish(first)
    shape = ops.shape_of(hidden)
    rows = ops.transpose(ops.reshape(hidden, ops.constant([0, 0, -1]), True), ops.constant([0, 2, 1]))
    rows = ops.mvn(rows, ops.constant([2]), True, 1e-5, "inside_sqrt")
    q, k, v = linear(rows, "to_q", width, width), linear(text, "to_k", width, words), linear(text, "to_v", width, words)
    scores = ops.softmax(named(ops.matmul(q, k, False, True), "scores"), 2)
    mixed = ops.add(rows, linear(named(ops.matmul(scores, v, False, False), "mix"), "to_out", width, width))
    up = ops.gelu(linear(mixed, "up", 128, width), "erf")
    rows = ops.add(mixed, linear(up, "down", width, 128))
    hidden = ops.reshape(ops.transpose(rows, ops.constant([0, 2, 1])), shape, False)
    out = named(ops.convolution(hidden, weight(4, width, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]), "conv_out")
    made = ov.Model([out], [sample, text], "network")
    for number, op in enumerate(made.get_ordered_ops()):
        if op.get_friendly_name().startswith(f"{op.get_type_name()}_"):  # OpenVINO goes on counting from model to model
            op.set_friendly_name(f"{op.get_type_name()}.{number}")
    for port, name in zip(made.inputs, ("sample", "text"), strict=True):
        port.get_tensor().set_names({name})
    made.outputs[0].get_tensor().set_names({"out"})
    return made


def records(count: int = 6, seed: int = 1) -> list[dict[str, Any]]:
    """Return inputs of shapes that differ, as guidance and sizes make them."""
    rng = np.random.default_rng(seed)
    return [
        {
            "sample": rng.normal(size=(1 + n % 2, 4, 8, 8 + 4 * (n % 3))).astype(np.float32),
            "text": rng.normal(size=(1 + n % 2, 7, 96)).astype(np.float32),
        }
        for n in range(count)
    ]


class Recorded:
    """A calibration of fixed records, whose score really runs the models."""

    def __init__(self, fixed: float | None = None) -> None:
        self.fixed = fixed
        self.scored = 0

    def inputs(self, role: str, count: int) -> list[dict[str, Any]]:
        return records()[:count]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        self.scored += 1
        return closeness(*models.values()) if self.fixed is None else self.fixed


def closeness(model: ov.Model) -> float:
    """Return 1 less the relative error of `model` against the network."""
    errors = []
    for record, expected in zip(records(3, seed=2), _expected(), strict=True):
        found = testing.run(model, record)["out"]
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return 1 - float(np.mean(errors))


@functools.cache
def _expected() -> list[Any]:
    return [testing.run(network(), record)["out"] for record in records(3, seed=2)]


def bundle() -> ModelBundle:
    made = ModelBundle()
    made.models["unet"] = network()
    return made


def quantize(
    name: str,
    options: dict[str, Any],
    made: ModelBundle | None = None,
    keep: Mapping[str, list[str]] = {},
    score: float | None = None,
) -> tuple[ov.Model, Report]:
    described = testing.extension(ovforge_nncf, "quantizer", name)
    checked = validate_options(described.options_model(), options, where=name)
    made = made or bundle()
    report: Report = described.create(checked).quantize(made, Recorded(score), keep)
    return made.models["unet"], report


def data(count: int = 300) -> nncf.Dataset:
    return nncf.Dataset(records()[:count])


def same(ours: ov.Model, theirs: ov.Model) -> None:
    """Check that two models have the same operations and weights, and give the same."""
    graphs = []
    for model in (ours, theirs):
        ordered = model.get_ordered_ops()
        shapes = [(op.get_type_name(), str([port.get_partial_shape() for port in op.outputs()])) for op in ordered]
        contents = [op.get_tensor_view().data.tobytes() for op in ordered if op.get_type_name() == "Constant"]
        graphs.append((sorted(shapes), sorted(contents)))
    assert graphs[0] == graphs[1]
    for record in records(3, seed=3):
        assert np.array_equal(testing.run(ours, record)["out"], testing.run(theirs, record)["out"])


PTQ: list[tuple[dict[str, Any], Arguments]] = [
    ({}, dict),
    (
        {"model_type": "transformer", "preset": "mixed", "bias_correction": "off"},
        lambda: {
            "model_type": nncf.ModelType.TRANSFORMER,
            "preset": nncf.QuantizationPreset.MIXED,
            "advanced_parameters": nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        },
    ),
    ({"mode": "fp8_e4m3", "subset_size": 2}, lambda: {"mode": nncf.QuantizationMode.FP8_E4M3, "subset_size": 2}),
    ({"mode": "fp8_e5m2"}, lambda: {"mode": nncf.QuantizationMode.FP8_E5M2}),
    (
        {"advanced": {"inplace_statistics": False}, "weights_range": "mean_quantile", "bias_correction": "off"},
        lambda: {
            "advanced_parameters": nncf.AdvancedQuantizationParameters(
                inplace_statistics=False,
                weights_range_estimator_params=RangeEstimatorParametersSet.MEAN_QUANTILE,
                disable_bias_correction=True,
            ),
        },
    ),
    (
        {
            "ignored_scope": {"names": ["to_q"], "patterns": ["conv_o"], "types": ["Add"]},
            "overflow_fix": "enable",
            "bias_correction": "accurate",
            "activations_range": "median_minmax",
            "target_device": "cpu",
        },
        lambda: {
            "ignored_scope": nncf.IgnoredScope(names=["to_q"], patterns=["conv_o"], types=["Add"]),
            "fast_bias_correction": False,
            "target_device": nncf.TargetDevice.CPU,
            "advanced_parameters": nncf.AdvancedQuantizationParameters(
                overflow_fix=advanced.OverflowFix.ENABLE,
                activations_range_estimator_params=RangeEstimatorParametersSet.MEDIAN_MINMAX,
            ),
        },
    ),
    (
        {
            "model_type": "transformer",
            "smooth_quant": {"matmul": 0.5, "convolution": 0.3},
            "ignored_scope": {"subgraphs": [{"inputs": ["up"], "outputs": ["down"]}]},
            "activations_range": {"max": {"statistics": "quantile", "aggregator": "mean", "outliers": 0.01}},
            "advanced": {
                "channel_alignment": True,
                "activations": {"mode": "symmetric"},
                "weights": {"per_channel": False},
                "propagation": "do_not_merge_branches",
                "compress_weights": False,
            },
        },
        lambda: {
            "model_type": nncf.ModelType.TRANSFORMER,
            "ignored_scope": nncf.IgnoredScope(subgraphs=[nncf.Subgraph(inputs=["up"], outputs=["down"])]),
            "advanced_parameters": nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=0.5, convolution=0.3),
                disable_channel_alignment=False,
                activations_quantization_params=advanced.QuantizationParameters(
                    mode=advanced.QuantizationMode.SYMMETRIC
                ),
                weights_quantization_params=advanced.QuantizationParameters(per_channel=False),
                quantizer_propagation_rule=advanced.QuantizerPropagationRule.DO_NOT_MERGE_BRANCHES,
                activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParameters(
                    max=nncf.quantization.range_estimator.StatisticsCollectorParameters(
                        nncf.quantization.range_estimator.StatisticsType.QUANTILE,
                        nncf.quantization.range_estimator.AggregatorType.MEAN,
                        quantile_outlier_prob=0.01,
                    )
                ),
                backend_params={"compress_weights": False},
            ),
        },
    ),
]


@pytest.mark.parametrize(("options", "given"), PTQ)
def test_quantization_is_nncfs_own(options: dict[str, Any], given: Arguments) -> None:
    ours, report = quantize("nncf-ptq", options)
    same(ours, nncf.quantize(network(), data(options.get("subset_size", 300)), **given()))
    assert report.roles == ("unet",)
    assert set(report.layers["unet"]) <= {op.get_friendly_name() for op in network().get_ops()}
    assert len(report.layers["unet"]) > 3


@pytest.mark.parametrize("release", [nncf.__version__, "3.99.0"])
def test_weights_are_measured_one_at_a_time(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, compiled = ov.Core.compile_model, list[ov.Model]()

    def compile_model(core: ov.Core, model: ov.Model, *arguments: Any, **options: Any) -> ov.CompiledModel:
        compiled.append(model)
        return original(core, model, *arguments, **options)

    monkeypatch.setattr(ov.Core, "compile_model", compile_model)
    monkeypatch.setattr(nncf, "__version__", release)
    ours, _ = quantize("nncf-ptq", {"bias_correction": "off"})
    monkeypatch.undo()
    parameters = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    same(ours, nncf.quantize(network(), data(), advanced_parameters=parameters))
    whole = [model for model in compiled if any(port.any_name == "sample" for port in model.inputs)]
    assert len(whole) == 1
    if release == "3.99.0":  # its own way: nobody knows how that one compiles
        assert len(compiled) == 1
        assert constant_results(whole[0])
    else:
        assert not constant_results(whole[0])
        weights = [max(np.prod(port.shape) for port in model.inputs) for model in compiled if model is not whole[0]]
        assert {4 * 64 * 9, 64 * 64, 64 * 96, 64 * 128} == set(weights)


WEIGHTS: list[tuple[dict[str, Any], Arguments]] = [
    ({"mode": "int8_asym"}, dict),
    (
        {"mode": "int4_sym", "group_size": 32, "awq": True},
        lambda: {"group_size": 32, "awq": True, "dataset": data(128)},
    ),
    (
        {"mode": "int4_asym", "group_size": 32, "awq": True, "data": False, "all_layers": True},
        lambda: {
            "group_size": 32,
            "awq": True,
            "all_layers": True,
            "advanced_parameters": advanced.AdvancedCompressionParameters(
                awq_params=advanced.AdvancedAWQParameters(prefer_data_aware_scaling=False)
            ),
        },
    ),
    (
        {"mode": "int4_sym", "group_size": 32, "scale_estimation": True, "subset_size": 4, "ratio": 0.7},
        lambda: {
            "group_size": 32,
            "scale_estimation": True,
            "ratio": 0.7,
            "subset_size": 4,
            "dataset": data(4),
        },
    ),
    (
        {"mode": "nf4", "group_size": 32, "gptq": True, "advanced": {"gptq": {"damp": 0.2, "block_size": 32}}},
        lambda: {
            "group_size": 32,
            "gptq": True,
            "dataset": data(128),
            "advanced_parameters": advanced.AdvancedCompressionParameters(
                gptq_params=advanced.AdvancedGPTQParameters(damp_percent=0.2, block_size=32)
            ),
        },
    ),
    (
        {"mode": "int4_sym", "group_size": 32, "lora_correction": True, "advanced": {"lora_correction": {"rank": 4}}},
        lambda: {
            "group_size": 32,
            "lora_correction": True,
            "dataset": data(128),
            "advanced_parameters": advanced.AdvancedCompressionParameters(
                lora_correction_params=advanced.AdvancedLoraCorrectionParameters(adapter_rank=4)
            ),
        },
    ),
    (
        {"mode": "int3_sym", "group_size": 32, "ratio": 0.5, "sensitivity_metric": "mean_activation_variance"},
        lambda: {
            "group_size": 32,
            "ratio": 0.5,
            "sensitivity_metric": nncf.SensitivityMetric.MEAN_ACTIVATION_VARIANCE,
            "dataset": data(128),
        },
    ),
    (
        {"mode": "int2_sym", "group_size": 32, "backup_mode": "none"},
        lambda: {"group_size": 32, "backup_mode": nncf.BackupMode.NONE},
    ),
    ({"mode": "cb4"}, dict),
    (
        {"mode": "fp4", "group_size": 32, "backup_mode": "int8_sym"},
        lambda: {"group_size": 32, "backup_mode": nncf.BackupMode.INT8_SYM},
    ),
    ({"mode": "fp8_e4m3", "group_size": -1}, lambda: {"group_size": -1}),
    ({"mode": "mxfp4", "backup_mode": "none"}, lambda: {"backup_mode": nncf.BackupMode.NONE}),
    ({"mode": "mxfp8_e4m3", "backup_mode": "int8_asym"}, lambda: {"backup_mode": nncf.BackupMode.INT8_ASYM}),
    (
        {"mode": "nvfp4", "ignored_scope": {"types": ["Convolution"]}},
        lambda: {"ignored_scope": nncf.IgnoredScope(types=["Convolution"])},
    ),
    (
        {"mode": "codebook", "codebook": [-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 1.0]},
        lambda: {
            "advanced_parameters": advanced.AdvancedCompressionParameters(
                codebook=np.array([-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 1.0], np.float32)
            )
        },
    ),
    (
        {"mode": "adaptive_codebook", "ignored_scope": {"patterns": ["to_", "down"]}},
        lambda: {"ignored_scope": nncf.IgnoredScope(patterns=["to_", "down"]), "dataset": data(128)},
    ),
]


@pytest.mark.parametrize(
    ("options", "given"), WEIGHTS, ids=lambda value: value["mode"] if isinstance(value, dict) else ""
)
def test_compression_is_nncfs_own(options: dict[str, Any], given: Arguments) -> None:
    ours, report = quantize("nncf-weights", options)
    same(ours, nncf.compress_weights(network(), mode=nncf.CompressWeightsMode(options["mode"]), **given()))
    assert report.roles == ("unet",)
    assert report.bytes_before is not None
    assert report.bytes_after is not None
    assert report.bytes_after < report.bytes_before
    assert set(report.layers["unet"]) <= {"conv_in", "conv_out", "to_q", "to_k", "to_v", "to_out", "up", "down"}
    assert "up" in report.layers["unet"]


@pytest.mark.parametrize("activations", ["convolutions", "all"])
def test_hybrid_is_nncfs_two_steps(activations: str) -> None:
    ours, report = quantize("nncf-hybrid", {"activations": activations, "bias_correction": "off"})
    first = nncf.compress_weights(
        network(),
        mode=nncf.CompressWeightsMode.INT8_SYM,
        ignored_scope=nncf.IgnoredScope(types=["Convolution"]),
    )
    matrices = ["to_q", "to_k", "to_v", "to_out", "up", "down"]
    others = ["MatMul", "Add", "MVN", "Multiply"] if activations == "convolutions" else []
    theirs = nncf.quantize(
        first,
        data(),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=matrices, types=others, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True, smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1)
        ),
    )
    same(ours, theirs)
    found = {op.name: (op.weights, op.activations) for op in lowered(ours)}
    assert found["conv_in"] == found["conv_out"] == ("INT8", "INT8")
    assert all(found[name] == ("INT8", None) for name in matrices)
    assert ("scores" in found or "mix" in found) == (activations == "all")
    assert set(report.layers["unet"]) == set(found)


@pytest.mark.parametrize("options", [{}, {"restore": "only_activations", "drop_type": "relative"}])
def test_accuracy_control_is_nncfs_own(options: dict[str, Any]) -> None:
    few = {"types": ["Add", "MVN"], "patterns": ["to_", "mix"]}
    base: dict[str, Any] = {"preset": "mixed", "ignored_scope": few, "bias_correction": "off"}
    plain, _ = quantize("nncf-ptq", base)
    limit = 0.6 * (1 - closeness(plain))
    ours, report = quantize("nncf-accuracy", {"max_drop": limit, **base, **options})

    def validate(model: ov.CompiledModel, items: Any) -> tuple[float, list[float]]:
        list(items)
        errors = []
        for record, expected in zip(records(3, seed=2), _expected(), strict=True):
            errors.append(np.linalg.norm(model(record)["out"] - expected) / np.linalg.norm(expected))
        return 1 - float(np.mean(errors)), [1 - float(np.mean(errors))]

    theirs = nncf.quantize_with_accuracy_control(
        network(),
        data(),
        nncf.Dataset([0]),
        validate,
        max_drop=limit,
        drop_type=nncf.DropType(options.get("drop_type", "absolute")),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(**few),
        advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            num_ranking_workers=1, restore_mode=advanced.RestoreMode(options.get("restore", "activations_and_weights"))
        ),
    )
    same(ours, theirs)
    assert closeness(ours) >= 1 - limit - 1e-6
    assert any("given back for the score" in note for note in report.notes)
    assert len(lowered(ours)) <= len(lowered(plain))


def test_later_roles_get_what_is_left() -> None:
    """Two roles, one limit: the second's trials run beside the first's result, and may lose what that one left."""
    made = bundle()
    made.models["controlnet"] = network()
    seen: list[tuple[str, ...]] = []
    base: dict[str, Any] = {"ignored_scope": {"types": ["Add", "MVN"], "patterns": ["to_", "mix", "up"]}}

    class Both(Recorded):
        def score(self, models: Mapping[str, ov.Model]) -> float:
            seen.append(tuple(models))
            return float(np.mean([closeness(model) for model in models.values()])) - 0.5 * (len(models) - 1)

    described = testing.extension(ovforge_nncf, "quantizer", "nncf-accuracy")
    checked = validate_options(
        described.options_model(), {"max_drop": 0.4, "max_num_iterations": 1, **base}, where="test"
    )
    report = described.create(checked).quantize(made, Both())
    assert report.roles == ("unet",)
    assert report.skipped[0].item == "controlnet"
    assert "below the limit" in report.skipped[0].reason
    assert seen[0] == ("unet",)
    assert seen[-1] == ("unet", "controlnet")
    assert not lowered(made.models["controlnet"])


def test_a_limit_that_cannot_be_reached_leaves_the_model() -> None:
    made = bundle()
    before = made.models["unet"]
    few: dict[str, Any] = {"ignored_scope": {"types": ["Add", "MVN"], "patterns": ["to_", "mix"]}}
    _, report = quantize("nncf-accuracy", {"max_drop": 0.0, "max_num_iterations": 1, **few}, made)
    assert made.models["unet"] is before
    assert "below the limit" in report.skipped[0].reason
    assert not lowered(before)


def test_what_the_pipeline_raises_is_passed_on() -> None:
    made = bundle()
    described = testing.extension(ovforge_nncf, "quantizer", "nncf-accuracy")
    stopped = Cancelled()

    class Stopping(Recorded):
        def score(self, models: Mapping[str, ov.Model]) -> float:
            self.scored += 1
            raise stopped

    calibration = Stopping()
    options = described.options_model()()  # type: ignore[misc]
    with pytest.raises(Cancelled) as raised:
        described.create(options).quantize(made, calibration)
    assert raised.value is stopped
    assert calibration.scored == 1
    assert not lowered(made.models["unet"])


@pytest.mark.parametrize("name", ["nncf-ptq", "nncf-hybrid", "nncf-weights", "nncf-accuracy"])
def test_what_is_to_be_kept_stays(name: str) -> None:
    options = {"max_drop": 1.0} if name == "nncf-accuracy" else {}
    ours, report = quantize(name, options, keep={"unet": ["conv_in", "up"]})
    assert not {"conv_in", "up"} & {op.name for op in lowered(ours)}
    assert {"conv_out", "down"} <= set(report.layers["unet"])
    if name != "nncf-weights":
        assert "unet: as they were: 1 Convolution, 1 MatMul (kept for quality)" in report.notes


def test_what_is_quantized_already_is_refused() -> None:
    for first, said in (("nncf-ptq", "in INT8"), ("weights-int8", "in INT8 weights")):
        made = bundle()
        quantize(first, {}, made)
        for name in ("nncf-ptq", "nncf-hybrid", "nncf-accuracy"):
            with pytest.raises(ModelError, match="it is quantized already") as raised:
                quantize(name, {}, made)
            assert said in str(raised.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nncf-ptq", {"smooth_quant": {}}, "smooth_quant is for model_type = 'transformer'"),
        ("nncf-ptq", {"smooth_quant": {"matmul": -0.5}, "model_type": "transformer"}, "-1 for off"),
        ("nncf-ptq", {"mode": "fp8_e4m3", "preset": "mixed"}, "preset = 'mixed' is for integers"),
        ("nncf-ptq", {"mode": "fp8_e5m2", "target_device": "gpu"}, "is for target_device = 'any' or 'cpu'"),
        ("nncf-ptq", {"mode": "fp8_e5m2", "overflow_fix": "enable"}, "overflow_fix is for integers"),
        ("nncf-ptq", {"mode": "fp8_e5m2", "advanced": {"quantize_outputs": True}}, "quantize_outputs is for integers"),
        ("nncf-ptq", {"mode": "fp8_e5m2", "advanced": {"weights": {"num_bits": 8}}}, "advanced.weights is for integers"),
        ("nncf-ptq", {"advanced": {"weights": {"fp8": "f8e4m3"}}}, "advanced.weights.fp8 is for mode"),
        ("nncf-ptq", {"advanced": {"activations": {"num_bits": 4}}}, "is for target_device = 'npu'"),
        ("nncf-ptq", {"advanced": {"bias_threshold": 2}, "bias_correction": "off"}, "bias_threshold is nothing"),
        ("nncf-ptq", {"activations_range": {"max": {"aggregator": "histogram"}}}, "activations_range"),
        ("nncf-ptq", {"ignored_scope": {"patterns": ["("]}}, "not a regular expression"),
        ("nncf-ptq", {"ignored_scope": {"names": ["conv_inn"]}}, "Did you mean 'conv_in'"),
        ("nncf-ptq", {"ignored_scope": {"types": ["Matmul"]}}, "Did you mean 'MatMul'"),
        ("nncf-ptq", {"ignored_scope": {"patterns": ["attention"]}}, "no name of an operation"),
        ("nncf-ptq", {"ignored_scope": {"subgraphs": [{"inputs": ["up"], "outputs": ["dawn"]}]}}, "'down'"),
        ("nncf-ptq", {"roles": ["unnet"]}, "Did you mean 'unet'"),
        ("nncf-ptq", {"subset_size": 0}, "subset_size"),
        ("nncf-accuracy", {"mode": "fp8_e4m3"}, "unknown key `mode`"),
        ("nncf-hybrid", {"ratio": 0.5}, "ratio is for modes below 8 bits"),
        ("nncf-hybrid", {"weights_mode": "codebook"}, "is for nncf-weights alone"),
        ("nncf-weights", {"mode": "int8_sym", "gptq": True}, "gptq is for modes below 8 bits"),
        ("nncf-weights", {"mode": "mxfp4", "group_size": 64}, "group_size is 32"),
        ("nncf-weights", {"mode": "nvfp4", "group_size_fallback": "adjust"}, "whose groups have 16 weights"),
        ("nncf-weights", {"mode": "mxfp4"}, "groups of 8-bit floats"),
        ("nncf-weights", {"mode": "fp4", "awq": True}, "awq is for integers, nf4 and codebooks"),
        ("nncf-weights", {"mode": "nf4", "gptq": True, "lora_correction": True}, "do not go together"),
        ("nncf-weights", {"mode": "nf4", "gptq": True, "data": False}, "gptq needs data"),
        ("nncf-weights", {"mode": "adaptive_codebook", "data": False}, "needs data"),
        ("nncf-weights", {"mode": "nf4", "compression_format": "fake_quantize"}, "training in PyTorch"),
        ("nncf-weights", {"mode": "codebook"}, "codebook goes with mode"),
        ("nncf-weights", {"mode": "codebook", "codebook": [1, 0]}, "must rise"),
        ("nncf-weights", {"mode": "nf4", "advanced": {"awq": {"alpha_min": 0.5, "alpha_max": 0.1}}}, "alpha_max"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        quantize(name, options)
    assert message in f"{raised.value} {raised.value.hint}"


def test_no_data_and_too_little_memory_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    described = testing.extension(ovforge_nncf, "quantizer", "nncf-ptq")
    quantizer = described.create(validate_options(described.options_model(), {}, where="test"))

    class Empty(Recorded):
        def inputs(self, role: str, count: int) -> list[dict[str, Any]]:
            return []

    with pytest.raises(ModelError, match="no inputs of 'unet' were recorded"):
        quantizer.quantize(bundle(), Empty())
    monkeypatch.setattr(running, "available_memory", lambda: 1000)
    with pytest.raises(ModelError, match="GiB of memory") as raised:
        quantizer.quantize(bundle(), Recorded())
    assert "nncf-hybrid" in str(raised.value.hint)


def test_what_nncf_raises_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault, or an interruption, when the first of two roles is done: our error, and the bundle as it was."""
    faults = (
        (RuntimeError("std::bad_alloc"), ModelError, "memory ran out"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    )
    options: dict[str, Any] = {"roles": ["unet", "controlnet"], "subset_size": 1}
    for name, changing in (
        ("nncf-ptq", "quantize"),
        ("nncf-hybrid", "quantize"),
        ("nncf-weights", "compress_weights"),
        ("nncf-accuracy", "quantize_with_accuracy_control"),
    ):
        for fault, raised, message in faults if name != "nncf-accuracy" else faults[:1]:
            made = bundle()
            made.models["controlnet"] = network()
            before = dict(made.models)
            calls: list[str] = []
            real = getattr(nncf, changing)

            def fail(*arguments: Any, **given: Any) -> Any:
                calls.append(name)  # noqa: B023
                if len(calls) == 2:  # noqa: B023
                    raise fault  # noqa: B023
                return real(*arguments, **given)  # noqa: B023

            with monkeypatch.context() as patched:
                patched.setattr(nncf, changing, fail)
                with pytest.raises(raised, match=message):
                    quantize(name, options | ({"max_drop": 1.0} if name == "nncf-accuracy" else {}), made, score=0.5)
            assert all(made.models[role] is model for role, model in before.items())
            same(before["unet"], network())


def test_what_the_runtime_cannot_do_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {weights.ability(mode) for mode in ("int8_sym", "int4_sym", "nf4", "codebook")} <= {"compressed", "unpacked"}
    monkeypatch.setattr(weights, "ability", lambda mode: "unpacked")
    _, report = quantize("nncf-weights", {"mode": "int8_sym"})
    assert "not in memory nor faster" in report.notes[0]
    monkeypatch.setattr(weights, "ability", lambda mode: "no such type")
    for name in ("nncf-weights", "nncf-hybrid"):
        made = bundle()
        with pytest.raises(ConfigError, match="cannot run int8_sym weights: no such type"):
            quantize(name, {}, made)
        assert not lowered(made.models["unet"])


@pytest.mark.parametrize(
    ("flags", "fast", "note"),
    [
        ("flags : fpu avx2 avx512f", False, "not faster"),
        ("flags : fpu avx2 avx512_vnni", True, "faster than floats"),
        ("flags : amx_tile amx_int8", True, "faster than floats"),
        ("model name : something", None, "only if the CPU has VNNI or AMX"),
    ],
)
def test_what_int8_brings_here_is_said(
    flags: str, fast: bool | None, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(running.Path, "read_text", lambda *arguments, **options: flags)
        assert running.has_fast_int8() is fast
    assert note in running.speed_note(fast)


def test_it_is_said_why_weights_have_eight_bits() -> None:
    four = {"mode": "int4_sym", "group_size": 64}
    _, report = quantize("nncf-weights", {**four, "group_size_fallback": "adjust", "advanced": {"min_group_size": 64}})
    assert [note for note in report.notes if "8 bits" in note] == [
        "unet: in 8 bits, not int4_sym: conv_in and 1 more (NNCF gives convolutions no int4_sym)",
        "unet: in 8 bits, not int4_sym: to_k and 1 more (a row of 96 weights is not divided by group_size = 64)",
        "unet: in 8 bits, not int4_sym: down (the last layer keeps 8 bits unless all_layers = true)",
    ]
    with pytest.raises(
        ConfigError, match=r"groups of 64 do not divide the rows of weights of to_v \(96\), to_k \(96\)"
    ):
        quantize("nncf-weights", four)
    _, report = quantize("nncf-weights", {"mode": "int8_sym"})
    assert not [note for note in report.notes if "8 bits" in note]


def test_recipes_are_their_base_with_other_defaults() -> None:
    article = {"model_type": "transformer", "preset": "mixed", "bias_correction": "off"}
    same(quantize("sd-int8-hybrid", {})[0], quantize("nncf-hybrid", {"bias_correction": "off"})[0])
    same(quantize("weights-int8", {})[0], quantize("nncf-weights", {})[0])
    four = {"mode": "int4_sym", "group_size": 64, "group_size_fallback": "adjust"}
    same(quantize("weights-int4", {})[0], quantize("nncf-weights", four)[0])
    same(quantize("detector-int8", {"roles": ["unet"]})[0], quantize("nncf-ptq", article)[0])
    for name in ("sd-int8-hybrid", "weights-int8", "weights-int4", "detector-int8"):
        model = testing.extension(ovforge_nncf, "quantizer", name).options_model()
        assert model is not None
        assert all(info.description for info in model.model_fields.values())


def test_contracts_hold() -> None:
    testing.check_plugin(ovforge_nncf)
    for name in ("nncf-ptq", "nncf-hybrid"):
        testing.check_quantizer(ovforge_nncf, name, {"subset_size": 2}, bundle, Recorded())


def test_accuracy_control_scores_the_pipeline_itself() -> None:
    pipe = ovforge.Pipeline(
        "text-to-image",
        source=EMBEDDED,
        cache=None,
        device=Use("cpu", precision="f32"),
        quantize=[Use("nncf-accuracy", roles=["vae_decoder"], max_drop=0.5, subset_size=1, bias_correction="off")],
        calibration={"samples": 1, "runs": 1, "options": {"steps": 1}},
        quality={"max_drop": 0.9, "samples": 1, "options": {"steps": 1}},
    )
    report = next(report for report in pipe.reports if report.sizes)
    assert report.roles == ("vae_decoder",)
    assert any(note.startswith("vae_decoder: score 0.") and "from 1, limit 0.5" in note for note in report.notes)
