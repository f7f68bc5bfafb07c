"""Fused adapters against diffusers with peft, and against LyCORIS: weights, and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ovforge
import ovforge_sd_lora
from ovforge import Use, testing
from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge.store.cache import Cache
from ovforge_sd_lora.adapter import open_adapter
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.targets import find_targets, stored_nodes
from ovforge_sd_lora.transform import LoraTransform

from .conftest import Family, compress, ours, pictures, torch_weights, weights

Families = Callable[[str], Family]
Lora = Callable[..., Path]


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], before: Mapping[str, Any]) -> int:
    """Check that all weights agree; return how many have changed."""
    changed = 0
    for name, wanted in theirs.items():
        if name in ours:
            scale = np.abs(wanted).max()
            assert np.abs(ours[name].reshape(wanted.shape) - wanted).max() <= 2e-5 * max(scale, 1), name
            changed += not np.array_equal(wanted, before[name])
        elif name.endswith(("weight", "bias")):  # a bias of zeros is left out
            assert not wanted.any() or "embedding" in name, name
    return changed


@pytest.mark.parametrize("name", ["sd1", "xl"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_weights_are_those_of_diffusers(family: Families, lora: Lora, name: str, dora: bool) -> None:
    path, scale = lora(name, 1, dora=dora), 1.0 if dora else 0.7
    bundle = family(name).bundle()
    report = LoraTransform(LoraOptions(path=path, scale=scale)).apply(bundle)
    assert not report.skipped
    assert set(report.roles) == {"unet", "text_encoder"} | ({"text_encoder_2"} if name == "xl" else set())
    pipe = family(name).pipe()
    before = {role: torch_weights(getattr(pipe, role)) for role in report.roles}
    pipe.load_lora_weights(path)
    pipe.fuse_lora(components=list(report.roles), lora_scale=scale)
    changed = 0
    for role in report.roles:
        strip = (lambda names: {k.removeprefix("text_model."): v for k, v in names.items()}) if "text" in role else dict
        theirs = strip(torch_weights(getattr(pipe, role)))
        changed += compare(weights(bundle, role), theirs, strip(before[role]))
    assert changed == len({(m.role, m.name) for m in open_adapter(path, "x").modules})


KOHYA = {
    "unet.": "lora_unet_",
    "text_encoder.": "lora_te_",
    "text_encoder_2.": "lora_te2_",
}


def renamed(path: Path, style: str, target: Path, layers: int = 2) -> Path:
    """Write diffusers' file in another naming."""
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, Any] = {}
    for key, value in load_file(path).items():
        role = next(prefix for prefix in KOHYA if key.startswith(prefix))
        module, _, half = key.removeprefix(role).removesuffix(".weight").rpartition(".lora_")
        tensors[_written(style, role, module, {"A": "down", "B": "up"}[half], layers)] = value
    factors = {}
    for module in open_adapter(path, "x").modules:
        rank = module.rank or 1
        prefix = next(prefix for prefix, role in zip(KOHYA, ("unet", "text_encoder", "text_encoder_2"), strict=True)
                      if role == module.role)  # fmt: skip
        factors[_written(style, prefix, module.name, "alpha", layers)] = np.array(module.factor * rank, np.float32)
    save_file({**tensors, **factors}, target)
    return target


def _written(style: str, role: str, module: str, part: str, layers: int) -> str:
    half = {"down": "A", "up": "B"}.get(part)
    if style == "diffusers":
        return f"{role}{module}." + (f"lora_{half}.weight" if half else part)
    if style == "peft":
        return f"{role}base_model.model.{module}." + (f"lora_{half}.default.weight" if half else part)
    if style == "old":
        if re.search(r"\.to_(q|k|v|out\.0)$", module):
            place, _, layer = module.replace(".to_out.0", ".to_out").rpartition(".")
            return f"{role}{place}.processor.{layer}_lora.{part}.weight" if half else f"{role}{module}.alpha"
        between = ".lora_linear_layer" if "text" in role else ".lora"
        return f"{role}{module}{between}.{part}.weight" if half else f"{role}{module}.alpha"
    if style == "sgm" and role == "unet.":
        module = original(module, layers)
    prefix = "lora_te1_" if style == "sgm" and role == "text_encoder." else KOHYA[role]
    return f"{prefix}{module.replace('.', '_')}" + (f".lora_{part}.weight" if half else ".alpha")


def original(module: str, layers: int) -> str:
    """Return SDXL's own numbering, by the rules of diffusers' convert_diffusers_to_original_sdxl.py."""
    table = [("conv_in", "input_blocks.0.0"), ("conv_out", "out.2"), ("time_embedding.linear_1", "time_embed.0")]
    for block in range(3):
        for layer in range(layers + 1):
            down = block * (layers + 1) + layer + 1
            if layer < layers:
                table += [(f"down_blocks.{block}.resnets.{layer}.", f"input_blocks.{down}.0."),
                          (f"down_blocks.{block}.attentions.{layer}.", f"input_blocks.{down}.1.")]  # fmt: skip
            up = block * (layers + 1) + layer
            table += [(f"up_blocks.{block}.resnets.{layer}.", f"output_blocks.{up}.0."),
                      (f"up_blocks.{block}.attentions.{layer}.", f"output_blocks.{up}.1.")]  # fmt: skip
        table.append((f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{3 * (block + 1)}.0.op"))
    table += [(f"mid_block.resnets.{n}.", f"middle_block.{2 * n}.") for n in (0, 1)]
    table.append(("mid_block.attentions.0.", "middle_block.1."))
    for theirs, name in table:
        if module.startswith(theirs):
            module = name + module.removeprefix(theirs)
            break
    for theirs, name in (("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("conv2", "out_layers.3"),
                         ("conv_shortcut", "skip_connection")):  # fmt: skip
        module = module.replace(theirs, name) if module.endswith(theirs) else module
    return module


@pytest.mark.parametrize(
    ("name", "style"),
    [*(("sd1", style) for style in ("diffusers", "old", "peft", "kohya")), ("xl", "kohya"), ("xl", "sgm")],
)
def test_every_naming_says_the_same(family: Families, lora: Lora, tmp_path: Path, name: str, style: str) -> None:
    path = lora(name, 1)
    other = renamed(path, style, tmp_path / "other.safetensors")
    first, second = family(name).bundle(), family(name).bundle()
    LoraTransform(LoraOptions(path=path)).apply(first)
    report = LoraTransform(LoraOptions(path=other)).apply(second)
    assert not report.skipped
    for role in report.roles:
        one, two = weights(first, role), weights(second, role)
        assert all(np.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_sgm_names_are_read_as_diffusers_reads_them(family: Families, lora: Lora, tmp_path: Path) -> None:
    """diffusers' own conversion of SDXL files in the first numbering gives the weights that we find."""
    from safetensors.numpy import load_file, save_file

    path = renamed(lora("xl", 1, text=False), "sgm", tmp_path / "sgm.safetensors")
    tensors = load_file(path)  # diffusers 0.42 reads an alpha of an attention layer only where all have the same
    save_file(
        {key: np.array(5, np.float32) if key.endswith("alpha") else value for key, value in tensors.items()}, path
    )
    pipe = family("xl").pipe()
    before = torch_weights(pipe.unet)
    pipe.load_lora_weights(path)
    pipe.fuse_lora(components=["unet"])
    bundle = family("xl").bundle()
    LoraTransform(LoraOptions(path=path)).apply(bundle)
    assert compare(weights(bundle), torch_weights(pipe.unet), before) > 100


MODES = ["INT8_ASYM", "INT8_SYM", "INT4_SYM", "INT4_ASYM", "NF4"]


@pytest.mark.parametrize("mode", MODES)
def test_compressed_weights_are_opened_and_not_quantized_again(family: Families, lora: Lora, mode: str) -> None:
    path, small = lora("small", 1), family("small")
    bundle = small.compressed(mode)
    stored, plain = weights(bundle), weights(small.bundle())
    report = LoraTransform(LoraOptions(path=path, scale=0.7, mode="fuse", roles=["unet"])).apply(bundle)
    assert "not quantized again" in " ".join(report.notes)
    after, adapter = weights(bundle), open_adapter(path, "x")
    names = {module.name: module for module in adapter.modules if module.role == "unet"}
    for name, value in after.items():
        module = names.get(name.removesuffix(".weight"))
        if module is None:
            assert np.array_equal(value, stored[name])
        else:  # base as it was stored, plus the adapter, rounded to float16
            wanted = stored[name] + np.float32(0.7) * module.delta().reshape(value.shape)
            assert np.abs(value - wanted).max() <= np.abs(wanted).max() * 2**-11 * 1.01
            assert not np.array_equal(stored[name], plain[name])


@pytest.mark.parametrize("mode", MODES)
def test_asked_to_weights_are_quantized_again_as_nncf_does(family: Families, lora: Lora, mode: str) -> None:
    """What is stored then is, number by number, what nncf makes of the float model that base + adapter is."""
    from openvino import opset13 as ops

    path, small = lora("small", 1), family("small")
    bundle, fused = small.compressed(mode), small.bundle()
    options = LoraOptions(path=path, scale=0.7, roles=["unet"], compressed="requantize")
    before, size = find_targets("unet", bundle.models["unet"]), len(list(bundle.models["unet"].get_ops()))
    values = {name: target.weight() for name, target in before.items() if target.kind != "norm"}
    modules = {module.name: module for module in open_adapter(path, "x").modules if module.role == "unet"}
    for name, target in find_targets("unet", fused.models["unet"]).items():
        if target.kind != "norm":
            added = np.float32(0.7) * modules[name].delta().reshape(target.shape) if name in modules else 0
            target.weight_inputs()[0].replace_source_output(ops.constant(values[name] + added).output(0))
    wanted = find_targets("unet", compress(fused.models["unet"], mode))
    report = LoraTransform(options).apply(bundle)
    assert "as asked: that rounds by" in " ".join(report.notes)
    assert not bundle.adapters
    assert len(list(bundle.models["unet"].get_ops())) == size
    for name, target in find_targets("unet", bundle.models["unet"]).items():
        if name in modules:
            assert stored(target) == stored(wanted[name]), name
        elif target.kind != "norm":
            assert np.array_equal(target.weight(), values[name])


def stored(target: Any) -> dict[str, tuple[str, Any, bytes]]:
    """Return what is stored of a weight: part -> type, shape, bytes."""
    found = stored_nodes(target.weight_inputs()[0].get_source_output().get_node())
    kept = [node for node in found if node.get_type_name() == "Constant"]
    return {
        node.get_friendly_name().rpartition("/")[2] if "/" in node.get_friendly_name() else "numbers": (
            node.get_element_type().get_type_name(), list(node.get_output_shape(0)), node.data.tobytes()
        )
        for node in kept if node.get_element_type().get_type_name() != "i64"  # shapes
    }  # fmt: skip


def test_what_cannot_be_quantized_again_is_said(family: Families, lora: Lora) -> None:
    from openvino import opset13 as ops

    path = lora("small", 1, text=False)
    bundle = family("small").bundle()
    target = find_targets("unet", bundle.models["unet"])["mid_block.resnets.0.conv1"]
    low = ops.convert(ops.constant(np.zeros(target.shape, np.int8)), "f32")
    target.weight_inputs()[0].replace_source_output(ops.add(low, ops.constant(np.float32(1))).output(0))
    with pytest.raises(ModelError, match=r'resnets.0.conv1: .* with Add, not a product .*\n.*compressed = "float16"'):
        LoraTransform(LoraOptions(path=path, compressed="requantize")).apply(bundle)
    with pytest.raises(ValueError, match='mode is "runtime"'):
        LoraOptions(path=path, compressed="requantize", mode="runtime")


def test_weights_keep_their_type(family: Families, lora: Lora) -> None:
    """float16 and bfloat16 are rounded once; Converts and names stay."""
    from openvino import opset13 as ops

    from ovforge_sd_lora.targets import plain_constant

    path = lora("small", 1, text=False)
    exact = family("small").bundle()
    LoraTransform(LoraOptions(path=path)).apply(exact)
    wanted = weights(exact)
    for kind, unit in (("f16", 2**-11), ("bf16", 2**-7)):
        bundle = family("small").bundle()
        for target in find_targets("unet", bundle.models["unet"]).values():
            for port in target.weight_inputs():
                constant = port.get_source_output().get_node()
                if constant.get_type_name() == "Constant" and port.get_node().get_type_name() != "GroupNormalization":
                    stored = _as_type(constant.data, kind)
                    stored.set_friendly_name(constant.get_friendly_name())
                    port.replace_source_output(ops.convert(stored, "f32").output(0))
        names = {
            node.get_friendly_name() for node in bundle.models["unet"].get_ops() if "self." in node.get_friendly_name()
        }
        LoraTransform(LoraOptions(path=path)).apply(bundle)
        now = {
            node.get_friendly_name() for node in bundle.models["unet"].get_ops() if "self." in node.get_friendly_name()
        }
        assert names == now
        for path_, target in find_targets("unet", bundle.models["unet"]).items():
            if target.kind != "norm":
                constant = plain_constant(target.weight_inputs()[0].get_source_output())
                assert constant is not None
                assert constant.get_element_type().get_type_name() == kind
                value = wanted[f"{path_}.weight"]
                assert np.abs(target.weight() - value).max() <= np.abs(value).max() * unit * 2.5


def _as_type(values: Any, kind: str) -> Any:
    import openvino as ov
    from openvino import opset13 as ops

    if kind == "f16":
        return ops.constant(values.astype(np.float16))
    tensor = ov.Tensor(ov.Type.bf16, list(values.shape))
    tensor.data.view(np.uint16)[...] = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
    return ops.constant(tensor, shared_memory=True)


def test_a_sum_too_large_for_the_type_is_refused(family: Families, lora: Lora, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    bundle = family("sd1").bundle()
    target = find_targets("unet", bundle.models["unet"])["conv_in"]
    port = target.weight_inputs()[0]
    from openvino import opset13 as ops

    port.replace_source_output(ops.convert(ops.constant(target.weight().astype(np.float16)), "f32").output(0))
    save_file({"lora_unet_conv_in.diff": np.full(target.shape, 7e4, np.float32)}, tmp_path / "large.safetensors")
    with pytest.raises(ModelError, match="too large for f16"):
        LoraTransform(LoraOptions(path=tmp_path / "large.safetensors")).apply(bundle)


def test_scales_of_roles_and_blocks(family: Families, lora: Lora) -> None:
    path, base = lora("sd1", 1), family("sd1").bundle()
    plain, full = weights(base), family("sd1").bundle()
    LoraTransform(LoraOptions(path=path)).apply(full)
    whole = weights(full)
    bundle = family("sd1").bundle()
    options = LoraOptions(
        path=path, scale=0.5, role_scales={"text_encoder": 0},
        block_scales={"up_blocks": 0.0, "up_blocks.1": 2.0, "input_blocks.1": -1.0},
    )  # fmt: skip
    LoraTransform(options).apply(bundle)
    for name, value in weights(bundle).items():
        scale = 0.5
        if name.startswith("up_blocks"):
            scale = 1.0 if name.startswith("up_blocks.1.") else 0.0
        elif name.startswith(("down_blocks.0.resnets.0", "down_blocks.0.attentions.0")):
            scale = -0.5
        assert np.allclose(value, plain[name] + scale * (whole[name] - plain[name]), atol=2e-6), name
    ours_, theirs = weights(bundle, "text_encoder"), weights(base, "text_encoder")
    assert all(np.array_equal(ours_[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_scales": {"up_block.1": 1.0}}, "no layer of the adapter is in 'up_block.1'"),
        ({"role_scales": {"unett": 1.0}}, "no part for 'unett'"),
        ({"roles": ["text_encoder_2"]}, "no part for text_encoder_2"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    family: Families, lora: Lora, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraTransform(LoraOptions(path=lora("sd1"), **options)).apply(family("sd1").bundle())


def test_another_family_is_named(family: Families, lora: Lora, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(ModelError, match="56 wide"):
        LoraTransform(LoraOptions(path=lora("xl"))).apply(family("sd1").bundle())
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{name}.lora_down.weight": np.ones((2, 2048), np.float32),
            f"{name}.lora_up.weight": np.ones((640, 2), np.float32),
        },
        tmp_path / "xl.safetensors",
    )
    with pytest.raises(ModelError, match=r"trained on SDXL .* 2048 wide\), and this is"):
        LoraTransform(LoraOptions(path=tmp_path / "xl.safetensors")).apply(family("sd1").bundle())


def test_a_partial_match_is_refused_unless_told_otherwise(
    family: Families, lora: Lora, tmp_path: Path, cache: Cache
) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(lora("small", text=False))
    prefix = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors[f"{prefix}.lora_A.weight"] = np.zeros((3, 999), np.float32)
    tensors["unet.down_blocks.7.conv.lora_A.weight"] = tensors["unet.down_blocks.7.conv.lora_B.weight"] = np.eye(
        2, dtype="f"
    )
    tensors["unet.mid_block.attentions.0.proj_in.oft_diag"] = np.eye(2, dtype="f")
    tensors["mystery"] = np.eye(2, dtype="f")
    path = tmp_path / "partial.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"could not be applied.* and 3 more"):
        ours(family("small"), cache, Use("lora", path=path))
    pipe = ours(family("small"), cache, Use("lora", path=path), strict=False)
    result = pictures(pipe)
    lines = ["lora: mystery was not applied: no adapter's tensor", "lora: the file names no alpha"]
    config = {"task": "text-to-image", "load": str(family("small").converted), "strict": False,
              "transform": [{"use": "lora", "path": str(path)}]}  # fmt: skip
    planned = [line for stage in ovforge.plan(config, cache=cache).stages for line in stage.warnings]
    for warnings in (result.warnings, result.provenance["warnings"], planned):
        assert all(any(line.startswith(start) for line in warnings) for start in lines), warnings
        assert len(warnings) == len(pipe.reports[0].skipped) + len(pipe.reports[0].notes)
    skipped = {item.item.split(": ")[-1]: item.reason for item in pipe.reports[0].skipped}
    assert skipped["down_blocks.7.conv"] == "the model has no such layer"
    assert skipped["mystery"] == "no adapter's tensor"
    assert "'oft_diag'" in skipped["unet.mid_block.attentions.0.proj_in.oft_diag"]
    assert "999" in skipped[prefix.removeprefix("unet.")]


def test_the_cache_knows_the_adapter_by_its_content(family: Families, lora: Lora, cache: Cache, tmp_path: Path) -> None:
    """The same path with another content is another pipeline; another path with the same content is not."""
    import shutil

    path = tmp_path / "adapter.safetensors"
    shutil.copy(lora("small", 0, text=False), path)
    first = ours(family("small"), cache, Use("lora", path=path, scale=0.5, name="a"))
    one = pictures(first).latents
    moved = Path(shutil.copy(path, tmp_path / "moved.safetensors"))
    again = ours(family("small"), cache, Use("lora", path=moved, scale=0.5, name="a"))
    assert again.provenance()["digests"] == first.provenance()["digests"]
    assert all(model.cached for role, model in again.compiled.all() if role == "unet")
    shutil.copy(lora("small", 1, text=False), path)
    other = ours(family("small"), cache, Use("lora", path=path, scale=0.5, name="a"))
    assert other.provenance()["digests"]["unet"] != first.provenance()["digests"]["unet"]
    assert not np.array_equal(pictures(other).latents, one)
    assert np.array_equal(pictures(again).latents, one)


def test_contract(family: Families, lora: Lora) -> None:
    testing.check_plugin(ovforge_sd_lora)
    for mode in ("fuse", "runtime"):
        testing.check_transform(
            ovforge_sd_lora, "lora", {"path": str(lora("small")), "mode": mode}, family("small").bundle
        )


@settings(max_examples=15)
@given(data=st.data())
def test_any_ranks_and_layers(family: Families, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random layers, ranks, alphas and kinds of one file: each weight is base + scale * alpha / rank * delta."""
    from safetensors.numpy import save_file

    bundle = family("small").bundle()
    targets = {p: t for p, t in find_targets("unet", bundle.models["unet"]).items() if t.kind != "norm"}
    chosen = data.draw(st.lists(st.sampled_from(sorted(targets)), min_size=1, max_size=6, unique=True))
    scale = data.draw(st.floats(-2, 2, width=32))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors, wanted = {}, {}
    for path in chosen:
        out, inner, *kernel = targets[path].shape
        rank, alpha = data.draw(st.integers(1, 40)), data.draw(st.none() | st.floats(0.125, 64, width=16))
        kind = data.draw(st.sampled_from(["f4", "f2"]))
        down, up = (rng.standard_normal(shape).astype(kind) / 8 for shape in ((rank, inner, *kernel), (out, rank)))
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up.reshape(out, rank, *([1] * len(kernel)))
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, kind)
        change = np.einsum("or,r...->o...", up.astype("f8"), down.astype("f8"))
        wanted[path] = targets[path].weight() + scale * (alpha if alpha is not None else rank) / rank * change
    file = tmp_path_factory.mktemp("any") / "any.safetensors"
    save_file(tensors, file)
    report = LoraTransform(LoraOptions(path=file, scale=scale)).apply(bundle)
    assert not report.skipped
    after = find_targets("unet", bundle.models["unet"])
    for path, value in wanted.items():
        assert np.allclose(after[path].weight(), value, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(value).max()))


def test_an_error_says_what_to_do(family: Families, lora: Lora, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(
        {
            "lora_unet_nowhere.lora_up.weight": np.eye(2, dtype="f"),
            "lora_unet_nowhere.lora_down.weight": np.eye(2, dtype="f"),
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(OvforgeError) as error:
        LoraTransform(LoraOptions(path=tmp_path / "x.safetensors")).apply(family("sd1").bundle())
    assert "nowhere" in str(error.value)
    assert "ovforge lora inspect" in str(error.value)


def test_models_that_went_through_onnx(family: Families, lora: Lora) -> None:
    """The article's models: a level for each module in the names, linear weights the other way round and nameless."""
    from openvino import opset13 as ops

    path = lora("sd1", 1, text=False)
    bundle, exact = family("sd1").bundle(), family("sd1").bundle()
    LoraTransform(LoraOptions(path=path)).apply(exact)
    wanted = weights(exact)
    for number, (name, target) in enumerate(find_targets("unet", bundle.models["unet"]).items()):
        for node in target.nodes:
            levels = re.sub(r"\.(?=[a-z])", "/", name)
            if target.kind == "linear":
                turned = ops.constant(np.ascontiguousarray(target.weight().T))
                turned.set_friendly_name(f"onnx::MatMul_{number}")
                made = ops.matmul(node.input_value(0), turned, False, False)
                for user in list(node.output(0).get_target_inputs()):
                    user.replace_source_output(made.output(0))
                made.set_friendly_name(f"/{levels}/MatMul")
            else:
                node.set_friendly_name(f"/{levels}/{'Conv' if target.kind == 'conv' else 'Mul'}")
    found = find_targets("unet", bundle.models["unet"])
    assert any(target.transposed for target in found.values())
    assert not LoraTransform(LoraOptions(path=path)).apply(bundle).skipped
    for name, value in weights(bundle).items():
        assert np.allclose(value, wanted[name], atol=1e-6), name
