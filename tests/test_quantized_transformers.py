"""Recipes for diffusion transformers and text encoders, on small models of each architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

import ovforge_nncf
from families import pipeline as ours
from ovforge import Use, testing
from ovforge.config.options import validate_options
from ovforge.errors import QualityError
from ovforge.model import FileSource, ssim
from ovforge.model.bundle import ModelBundle
from ovforge.store.cache import Cache
from ovforge_nncf.graph import lowered
from ovforge_nncf.parts import parts_of

nncf = pytest.importorskip("nncf")
pytest.importorskip("torch")
pytest.importorskip("diffusers")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

FAMILIES = ("sd3", "flux", "flux2", "zimage", "sana", "pixart", "lumina2")
ROTARY = {"flux": 2 * 4, "flux2": 2 * 4, "zimage": 2 * 6}
"""Family -> rotations of queries and keys in its blocks."""
EMBEDDINGS = (
    r"^(time_text_embed|time_guidance_embed|time_embed\.emb|t_embedder|adaln_single\.emb|time_caption_embed\.timestep)"
)
MODULATION = (
    r"norm1(_context)?\.linear|norm\.linear|norm_out\.linear(_1)?$|modulation|(time_embed|adaln_single)\.linear"
)
FIRST = (
    r"^(x_embedder|context_embedder|pos_embed\.proj|patch_embed\.proj|all_x_embedder|cap_embedder"
    r"|caption_projection\.linear_1|time_caption_embed\.caption)"
)
LAST = r"^(proj_out|all_final_layer\.2-1\.linear|norm_out\.linear_2)"
"""What parts are called in diffusers' modules, which the plugin does not look at."""

CALL: dict[str, Any] = {"steps": 2, "width": 32, "height": 24}
PROMPT = "a beautiful pink unicorn, 8k"
Folder = Callable[[str], Path]


class Recorded:
    """A calibration of random inputs, as the family's pipeline gives them to its transformer."""

    def __init__(self, model: ov.Model) -> None:
        self._model, self._rng = model, np.random.default_rng(0)

    def inputs(self, role: str, count: int) -> list[dict[str, Any]]:
        return [{port.any_name: self._input(port) for port in self._model.inputs} for _ in range(2)]

    def _input(self, port: Any) -> Any:
        shape = [side.get_length() if side.is_static else 0 for side in port.get_partial_shape()]
        name, kind = port.any_name, port.get_element_type().to_dtype()
        tokens = 32 if "img" in name or name == "hidden_states" else 64
        if len(shape) == 1:
            return self._rng.random(2).astype(kind)
        shape = [side or size for side, size in zip(shape, _SIZES[len(shape), name], strict=True)]
        if name.endswith("_ids"):
            places = np.arange(tokens, dtype=kind)[:, None] * np.ones(shape[-1], kind)
            return np.broadcast_to(places, shape).copy()
        return np.ones(shape, kind) if name.endswith("mask") else self._rng.standard_normal(shape).astype(kind)


_SIZES = {
    (4, "hidden_states"): (2, 0, 8, 16), (3, "hidden_states"): (2, 32, 0), (3, "encoder_hidden_states"): (2, 64, 0),
    (2, "pooled_projections"): (2, 0), (2, "encoder_attention_mask"): (2, 64), (2, "txt_ids"): (64, 0),
    (2, "img_ids"): (32, 0), (3, "txt_ids"): (2, 64, 0), (3, "img_ids"): (2, 32, 0),
}  # fmt: skip
"""(Axes, input) -> sizes that the model leaves open."""


def quantize(name: str, options: dict[str, Any], models: dict[str, ov.Model]) -> tuple[ModelBundle, Any]:
    described = testing.extension(ovforge_nncf, "quantizer", name)
    made = ModelBundle()
    made.models.update(models)
    checked = validate_options(described.options_model(), options, where=name)
    calibration = Recorded(models["transformer"]) if "transformer" in models else None
    return made, described.create(checked).quantize(made, calibration)


def run(model: ov.Model, record: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the output, and the kinds of layers that the runtime made."""
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    return compiled(record)[0].copy(), kinds


def off(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def constants(model: ov.Model) -> list[bytes]:
    ordered = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return sorted(op.get_tensor_view().data.tobytes() for op in ordered)


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_weights(transformer_folder: Folder, family: str) -> None:
    """The compressed layers are those that diffusers' names say, and the numbers are NNCF's own."""
    models = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(transformer_folder(family))).models
    model = models["transformer"]
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    layers = {
        name: re.sub(r"^__module\.|/.*", "", name)
        for name, kind in kinds.items()
        if kind in ("MatMul", "Convolution", "GroupConvolution") and re.search(r"aten::(linear|_convolution)", name)
    }
    found = parts_of(model)
    for part, pattern in (("embeddings", EMBEDDINGS), ("modulation", MODULATION), ("first", FIRST), ("last", LAST)):
        wanted = {name for name, module in layers.items() if re.search(pattern, module)}
        assert wanted
        assert {name for name in found[part] if name in layers} == wanted, part

    options = {"group_size": 16, "advanced": {"min_group_size": 8}, "backup_mode": "int8_sym"}
    bundle, report = quantize("transformer-int4", options, {"transformer": model})
    backed = {name for name, module in layers.items() if re.search(f"{EMBEDDINGS}|{MODULATION}|{FIRST}|{LAST}", module)}
    rest = {op.name for op in lowered(bundle.models["transformer"]) if op.weights == "INT4"}
    assert rest == {name for name in layers if name not in backed and kinds[name] == "MatMul"}
    assert set(report.layers["transformer"]) == set(layers)
    computed = {name for name in kinds if kinds[name] in ("MatMul", "Convolution", "GroupConvolution", "Gather")}
    parameters = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.quantization.advanced_parameters.GroupSizeFallbackMode.ADJUST,
        min_adjusted_group_size=8,
    )
    first = nncf.compress_weights(
        model.clone(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=16, all_layers=True,
        backup_mode=nncf.BackupMode.INT8_SYM, advanced_parameters=parameters,
        ignored_scope=nncf.IgnoredScope(names=sorted(backed | (computed - set(layers))), validate=False),
    )  # fmt: skip
    second = nncf.compress_weights(
        first, mode=nncf.CompressWeightsMode.INT8_SYM,
        ignored_scope=nncf.IgnoredScope(names=sorted(computed - backed), validate=False),
    )  # fmt: skip
    assert constants(bundle.models["transformer"]) == constants(second)
    [record] = Recorded(model).inputs("transformer", 1)[:1]
    wanted, _ = run(model, record)
    assert 0 < off(run(bundle.models["transformer"], record)[0], wanted) < 0.3

    encoders = {role: models[role] for role in models if role.startswith("text_encoder")}
    assert list(encoders) == [
        "text_encoder",
        *{"sd3": ["text_encoder_2", "text_encoder_3"], "flux": ["text_encoder_2"]}.get(family, []),
    ]
    bundle, report = quantize("text-encoders-int8", {}, encoders)
    assert report.roles == tuple(encoders)
    for role in encoders:
        by_nncf = nncf.compress_weights(encoders[role].clone(), mode=nncf.CompressWeightsMode.INT8_SYM)
        assert constants(bundle.models[role]) == constants(by_nncf), "NNCF itself leaves a text encoder's places"


@pytest.mark.parametrize("family", ROTARY)
def test_activations_leave_rotations_whole(transformer_folder: Folder, family: str) -> None:
    """The runtime still has its own operation for all of them, which NNCF by itself breaks."""
    model = (
        DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(transformer_folder(family))).models["transformer"]
    )
    records = Recorded(model).inputs("transformer", 2)
    wanted, kinds = run(model, records[0])
    assert kinds.count("RoPE") == ROTARY[family]
    bundle, _ = quantize("nncf-ptq", {"bias_correction": "off"}, {"transformer": model})
    found, kinds = run(bundle.models["transformer"], records[0])
    assert kinds.count("RoPE") == ROTARY[family]
    if family == "flux":
        parameters = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
        alone, kinds = run(nncf.quantize(model, nncf.Dataset(records), advanced_parameters=parameters), records[0])
        assert kinds.count("RoPE") < ROTARY[family]
        assert off(found, wanted) < off(alone, wanted)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "recipe"),
    [(family, "transformer-int8") for family in FAMILIES]
    + [(family, "transformer-ptq") for family in ("sana", "pixart", "lumina2")],
)
def test_a_quantized_pipeline(
    transformer_folder: Folder, session_cache: Cache, family: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held to a score, near the float32 picture, and found again at the second start."""
    options: dict[str, Any] = {
        "quantize": [recipe, "text-encoders-int8"],
        "calibration": {"samples": 2, "runs": 1, "options": CALL},
        "quality": {"min_score": 0.9, "samples": 1},
    }
    pipe = ours(transformer_folder(family), session_cache, **options)
    assert pipe.outcome.passed
    assert {"transformer", "text_encoder"} <= {role for report in pipe.reports for role in report.layers}
    wanted = np.asarray(ours(transformer_folder(family), session_cache)(PROMPT, seed=5, **CALL).images[0])
    made = np.asarray(pipe(PROMPT, seed=5, **CALL).images[0])
    # Activations of eight bits differ by the prompt's tokens, which change with the texts the tokenizer is trained on.
    assert ssim(made, wanted) > (0.8 if recipe == "transformer-ptq" else 0.9)
    assert (made != wanted).any()

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("what is stored was made again")

    monkeypatch.setattr(nncf, "quantize", again)
    monkeypatch.setattr(nncf, "compress_weights", again)
    second = ours(transformer_folder(family), session_cache, **options)
    np.testing.assert_array_equal(np.asarray(second(PROMPT, seed=5, **CALL).images[0]), made)


def test_what_eight_bits_are_too_few_for_stays_exact(transformer_folder: Folder) -> None:
    """Of activations, besides what conditions the model: sums that others are divided by, and depthwise convolutions."""
    model = (
        DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(transformer_folder("sana"))).models["transformer"]
    )
    blocks = [f"__module.transformer_blocks.{number}" for number in (0, 1)]
    products = {f"{block}.attn1/aten::matmul/MatMul{end}" for block in blocks for end in ("", "_1")}
    depthwise = {f"{block}.ff.conv_depth/aten::_convolution/GroupConvolution" for block in blocks}
    found = parts_of(model)
    assert (found["linear_attention"], found["depthwise"]) == (products, depthwise)
    bundle, report = quantize("transformer-ptq", {}, {"transformer": model})
    done = set(report.layers["transformer"])
    assert not done & (products | depthwise)
    assert {f"{block}.{layer}" for block in blocks for layer in (
        "attn1.to_q/aten::linear/MatMul", "attn1.to_out.0/aten::linear/MatMul",
        "ff.conv_inverted/aten::_convolution/Convolution", "ff.conv_point/aten::_convolution/Convolution",
    )} <= done  # fmt: skip
    [record, _] = Recorded(model).inputs("transformer", 2)
    wanted, _ = run(model, record)
    conditions = {"parts": ["embeddings", "modulation", "first", "last"]}
    everything, _ = quantize("transformer-ptq", {"ignored_scope": conditions}, {"transformer": model})
    errors = [off(run(each.models["transformer"], record)[0], wanted) for each in (bundle, everything)]
    assert 0 < errors[0] < errors[1]


def test_the_gate_refuses_what_is_too_far(transformer_folder: Folder, session_cache: Cache, tmp_path: Path) -> None:
    quality = {"min_score": 0.99999, "samples": 1, "options": CALL, "save": str(tmp_path / "worst")}
    four = Use("transformer-int4", group_size=16, advanced={"min_group_size": 8})
    with pytest.raises(QualityError, match="the quantized pipeline scores"):
        ours(transformer_folder("flux"), session_cache, quantize=[four], quality=quality)
