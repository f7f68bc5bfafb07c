"""Single files of diffusion transformers: safetensors in both namings, float8, GGUF; against their folders."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovforge.contracts.stages import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
gguf = pytest.importorskip("gguf")
ov = pytest.importorskip("openvino")

from safetensors.torch import save_file  # noqa: E402

from ovforge_convert import TensorWeight  # noqa: E402
from ovforge_diffusers.gguf_blocks import BLOCKS, FLOATS, read_groups  # noqa: E402
from ovforge_diffusers.gguf_file import read_gguf_header  # noqa: E402
from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402
from ovforge_diffusers.stored import GgufWeight, joined  # noqa: E402
from ovforge_diffusers.transformer_names import diffusers_rows  # noqa: E402

Tensors = dict[str, Any]


def neighbour() -> Any:
    """Return the test module beside this one, which knows small transformers."""
    spec = importlib.util.spec_from_file_location(
        "small_transformers", Path(__file__).with_name("test_transformers.py")
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = neighbour()
SHAPES: dict[str, dict[str, Any]] = {
    "flux": {
        **SMALL.FLUX, "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14), "joint_attention_dim": 256,
        "num_attention_heads": 8, "num_layers": 1, "num_single_layers": 1,
    },
    "sd3": {**SMALL.SD3, "attention_head_dim": 32, "caption_projection_dim": 64},
}  # fmt: skip


def make(family: str) -> Any:
    """Return a small transformer with random weights, whose shapes tell its config."""
    torch.manual_seed(0)
    kind = diffusers.FluxTransformer2DModel if family == "flux" else diffusers.SD3Transformer2DModel
    return SMALL.noise(kind(**SHAPES[family])).eval()


# -- the makers' naming, written down apart from the code under test ---------------------------------------------------

FLUX_NAMES = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer", "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer", "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj", "norm.linear": "modulation.lin", "single.proj_out": "linear2",
}  # fmt: skip
SD3_NAMES = {
    "pos_embed.proj": "x_embedder.proj", "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear", "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k", "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
}  # fmt: skip
NORMS = {"norm_q": "query_norm", "norm_k": "key_norm", "norm_added_q": "query_norm", "norm_added_k": "key_norm"}


def swap(tensor: Any) -> Any:
    return torch.cat(tensor.chunk(2)[::-1])


def to_original(family: str, state: Tensors) -> Tensors:
    """Write a transformer in its makers' naming: queries, keys and values as one, shift before scale."""
    found: Tensors = {}
    last = max(int(m[1]) for name in state if (m := re.match(r"transformer_blocks\.(\d+)\.", name)))
    for name, tensor in state.items():
        stem, kind = name.rsplit(".", 1)
        block = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.+)", stem)
        if name == "pos_embed.pos_embed":
            found["pos_embed"] = tensor
        elif stem == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{kind}"] = swap(tensor)
        elif block is None:
            found[f"{(FLUX_NAMES if family == 'flux' else SD3_NAMES)[stem]}.{kind}"] = tensor
        else:
            single, number, inside = block[1], block[2], block[3]
            attention, _, part = inside.rpartition(".")
            own = {"q": "k", "k": "v"}
            place = (
                f"{'single_blocks' if single else 'double_blocks'}.{number}"
                if family == "flux"
                else f"joint_blocks.{number}"
            )
            if part == "to_q" or part == "add_q_proj":
                names = [name.replace(part, part.replace("q", each)) for each in ("q", "k", "v")]
                together = [state[each] for each in names]
                side = "x_block" if part == "to_q" else "context_block"
                if single:
                    together.append(state[name.replace("attn.to_q", "proj_mlp")])
                    found[f"{place}.linear1.{kind}"] = torch.cat(together)
                elif family == "flux":
                    found[f"{place}.{'img' if part == 'to_q' else 'txt'}_attn.qkv.{kind}"] = torch.cat(together)
                else:
                    found[f"{place}.{side}.{attention}.qkv.{kind}"] = torch.cat(together)
            elif part in ("to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp"):
                assert own
            elif family == "flux" and part in NORMS:
                side = "" if single else ("txt_attn." if "added" in part else "img_attn.")
                found[f"{place}.{side}norm.{NORMS[part]}.scale"] = tensor
            elif family == "flux":
                found[
                    f"{place}.{FLUX_NAMES['single.' + inside if single and inside == 'proj_out' else inside]}.{kind}"
                ] = tensor
            else:
                final = inside == "norm1_context.linear" and int(number) == last
                found[f"{place}.{SD3_NAMES[inside]}.{kind}"] = swap(tensor) if final else tensor
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def load(path: Path, **options: Any) -> ModelBundle:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(path)) is Match.YES
    return loader.load(FileSource(path))


def outcome(bundle: ModelBundle, family: str) -> np.ndarray:
    """Return what a transformer gives for some inputs, in float32."""
    inputs = inputs_of(family)
    result: np.ndarray = SMALL.run(bundle.models["transformer"], inputs)["out_sample"]
    return result


def inputs_of(family: str) -> Tensors:
    inputs: Tensors = SMALL.flux_inputs(1, 4, 6, 3) if family == "flux" else SMALL.sd3_inputs(2, 4, 6, 3)
    if family == "flux":
        inputs["encoder_hidden_states"] = torch.randn(1, 3, 256)
    return inputs


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_names_are_those_of_diffusers_own_conversion(family: str) -> None:
    """With the real number of rows, which diffusers' code for FLUX takes for granted, and one column."""
    code = pytest.importorskip("diffusers.loaders.single_file_utils")
    shapes = {"flux": {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}, "sd3": {}}
    with torch.device("meta"):
        if family == "flux":
            module = diffusers.FluxTransformer2DModel(**{**SHAPES[family], **shapes[family]})
        else:
            module = diffusers.SD3Transformer2DModel(**SHAPES[family])
    state = {
        name: torch.randn(*tensor.shape[:1], *(1 for _ in tensor.shape[1:]))
        for name, tensor in module.state_dict().items()
    }
    file = to_original(family, state)
    convert = {
        "flux": code.convert_flux_transformer_checkpoint_to_diffusers, "sd3": code.convert_sd3_transformer_checkpoint_to_diffusers,
    }[family]  # fmt: skip
    wanted = convert(dict(file))
    rows = diffusers_rows(type(module).__name__, {name: tuple(tensor.shape) for name, tensor in file.items()})
    ours = joined({name: TensorWeight(tensor) for name, tensor in file.items()}, rows)
    assert ours.keys() == wanted.keys() == state.keys()
    for name, tensor in wanted.items():
        out = np.empty(ours[name].shape, np.float32)
        ours[name].fill(out)
        np.testing.assert_array_equal(out, tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_file_gives_what_the_module_gives(tmp_path: Path, family: str) -> None:
    """In both namings, with a prefix and without, in half precision too; and its config is found."""
    module = make(family)
    wanted = module(**inputs_of(family), return_dict=False)[0].detach().numpy()
    state = module.state_dict()
    original = to_original(family, state)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    files = {"prefixed": prefixed} if family == "flux" else {"makers": original, "diffusers": state}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        bundle = load(tmp_path / f"{name}.safetensors")
        assert bundle.index["transformer"] == ["diffusers", type(module).__name__]
        assert bundle.scheduler_config()["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        found, own = bundle.configs["transformer"], json.loads(json.dumps(dict(module.config)))
        told = own.keys() - {"sample_size", "_use_default_values", "pos_embed_max_size"}
        assert {key: found[key] for key in told & found.keys()} == {key: own[key] for key in told & found.keys()}
        torch.manual_seed(4)
        ours = outcome(bundle, family)
        assert (
            np.abs(ours - module(**inputs_of(family), return_dict=False)[0].detach().numpy()).max()
            < 1e-4 * np.abs(wanted).max()
        )


def test_float8_is_scaled(tmp_path: Path) -> None:
    """As ComfyUI writes it: a scale beside each weight, a marker, and scales of inputs that are not used."""
    module = make("sd3")
    state = to_original("sd3", module.state_dict())
    file: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    rounded: Tensors = {}
    for number, (name, tensor) in enumerate(state.items()):
        if tensor.ndim != 2:
            file[name] = rounded[name] = tensor
            continue
        kind = (torch.float8_e4m3fn, torch.float8_e5m2)[number % 2]
        scale = tensor.abs().max() / 400
        file[name] = (tensor / scale).to(kind)
        file[name.removesuffix("weight") + ("scale_weight", "weight_scale")[number % 2]] = scale
        file[name.removesuffix("weight") + "scale_input"] = torch.ones(())
        rounded[name] = file[name].float() * scale
    save_file(file, tmp_path / "fp8.safetensors")
    save_file(rounded, tmp_path / "rounded.safetensors")
    ours, wanted = (outcome(load(tmp_path / f"{name}.safetensors"), "sd3") for name in ("fp8", "rounded"))
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


# -- GGUF -----------------------------------------------------------------------------------------------------------

QUANTIZED = sorted(BLOCKS.keys() - FLOATS.keys())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_block_is_read_as_by_the_package_gguf(kind: str) -> None:
    width, size = BLOCKS[kind]
    raw = np.random.default_rng(1).integers(0, 256, (64, 3, size), dtype=np.uint8)
    number = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (width, size)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw.reshape(64, -1), number)
        ours = read_groups(kind, raw).values().reshape(64, -1)
    same = (ours.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(ours) & np.isnan(wanted))
    assert same.all()


def blocks_of(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Return random blocks whose scales are numbers of a usual size."""
    width, size = BLOCKS[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // width, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(
        kind, (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    )
    for place in places:
        small = np.random.default_rng(seed + place).random(raw.shape[:2]).astype(np.float16) * np.float16(0.01)
        raw[..., place : place + 2] = small[..., None].view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_runtime_multiplies_with_compressed_weights(kind: str) -> None:
    from openvino import opset13 as ops

    raw = blocks_of(kind, 64, 512, 2)
    weight = GgufWeight(kind, (64, 512), raw, "file")
    wanted = gguf.quants.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType[kind])
    data = ops.parameter([-1, 512], np.float32)
    compressed = weight.compressed("weight")
    model = ov.Model([ops.matmul(data, compressed, False, True)], [data])
    x = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(model, "CPU", options)
    result = compiled([x])[0]
    np.testing.assert_allclose(result, x @ wanted.T, atol=2e-5 * np.abs(x @ wanted.T).max())
    stored = [node for node in model.get_ops() if node.get_friendly_name() == "weight"]
    assert [node.get_element_type().get_type_name() for node in stored] == [read_groups(kind, raw).type]
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert set(kinds) == {"Input", "Const", "FullyConnected", "Output"}, "nothing is unpacked beforehand"


def test_groups_without_a_scale_keep_their_offset() -> None:
    raw = blocks_of("Q4_1", 2, 64, 3)
    raw[0, :, :2] = 0
    raw[1, 0, :4] = 0
    compressed = GgufWeight("Q4_1", (2, 64), raw, "file").compressed("weight")
    folded = ov.Core().compile_model(ov.Model([compressed], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
    wanted = gguf.quants.dequantize(raw.reshape(2, -1), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_allclose(folded, wanted, rtol=1e-5, atol=1e-7)


def write_gguf(path: Path, tensors: Tensors, kinds: Any) -> Tensors:
    """Write a file by the package gguf; return the values that it holds."""
    writer = gguf.GGUFWriter(path, "flux")
    held = {}
    for name, tensor in tensors.items():
        kind = kinds(name, tensor)
        number = gguf.GGMLQuantizationType[kind]
        if kind in FLOATS:
            data = gguf.quants.quantize(tensor.numpy(), number)
            held[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, number))).reshape(tensor.shape)
        elif kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
            data = gguf.quants.quantize(tensor.numpy(), number)
            held[name] = torch.from_numpy(gguf.quants.dequantize(data, number))
        else:
            data = blocks_of(kind, *tensor.shape, seed=len(held)).reshape(len(tensor), -1)
            held[name] = torch.from_numpy(gguf.quants.dequantize(data, number))
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def test_a_gguf_file_gives_what_its_values_give(tmp_path: Path) -> None:
    """Every type in one file of FLUX: matrices compressed and not, and rows that are taken apart."""
    module = make("flux")
    state = to_original("flux", module.state_dict())
    turn = iter(["F16", "BF16", *QUANTIZED] * 20)

    def kind(name: str, tensor: Any) -> str:
        if tensor.ndim != 2 or "img_in" in name or "vector_in.in" in name:
            return "F32"
        wide = tensor.shape[1] % 256 == 0
        return next(each for each in turn if wide or each in FLOATS or BLOCKS[each][0] == 32)

    held = write_gguf(tmp_path / "flux.gguf", state, kind)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "held.safetensors")
    torch.manual_seed(1)
    wanted = outcome(load(tmp_path / "held.safetensors"), "flux")
    plain, compressed = load(tmp_path / "flux.gguf"), load(tmp_path / "flux.gguf", weights="f16")
    torch.manual_seed(1)
    np.testing.assert_allclose(outcome(plain, "flux"), wanted, atol=1e-5 * np.abs(wanted).max())
    torch.manual_seed(1)
    np.testing.assert_allclose(outcome(compressed, "flux"), wanted, atol=2e-3 * np.abs(wanted).max())
    constants = [node for node in compressed.models["transformer"].get_ops() if node.get_type_name() == "Constant"]
    types = {node.get_element_type().get_type_name() for node in constants}
    assert {"i4", "u4", "i8", "u8"} <= types
    compressed.save(tmp_path / "saved")
    torch.manual_seed(1)
    again = outcome(ModelBundle.open(FileSource(tmp_path / "saved")), "flux")
    torch.manual_seed(1)
    np.testing.assert_array_equal(again, outcome(compressed, "flux"))


def header(tensors: int = 1, dims: tuple[int, ...] = (32, 2), kind: int = 8, offset: int = 0, data: int = 68) -> bytes:
    """Return a file with one tensor, as its fields say."""
    entry = struct.pack("<Q1sI", 1, b"x", len(dims)) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)
    start = b"GGUF" + struct.pack("<IQQ", 3, tensors, 0) + entry
    return start + bytes(-len(start) % 32) + bytes(data)


LIES = {
    "of type IQ2_XS": header(kind=17), "of type 99": header(kind=99), "outside of the file": header(data=67),
    "more than fit": header(tensors=2**60), "dimensions": header(dims=(32,) * 5), "whole blocks": header(dims=(33, 2)),
    "a shape of": header(dims=(2**41, 1)), "ends in the middle": header()[:40], "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "another processor": b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "not a GGUF": b"PK\3\4" + bytes(64), "outside": header(offset=2**63),
    "two tensors are named": header()[:4] + struct.pack("<IQQ", 3, 2, 0) + header()[24:65] * 2 + bytes(200),
}  # fmt: skip


@pytest.mark.parametrize("message", LIES)
def test_a_file_that_lies_is_an_error(tmp_path: Path, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(LIES[message])
    with pytest.raises(ModelError, match=message) as caught:
        read_gguf_header(FileSource(tmp_path / "x.gguf"), "x.gguf")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ModelError):
        DiffusersLoader(LoaderOptions()).load(FileSource(tmp_path / "x.gguf"))


@settings(max_examples=200)
@given(st.integers(0, 90), st.binary(min_size=1, max_size=9))
def test_damaged_headers_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, place: int, noise: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = bytearray(header())
    data[place : place + len(noise)] = noise
    path.write_bytes(data)
    try:
        entries = read_gguf_header(FileSource(path), path.name).tensors
    except ModelError:
        return
    assert all(0 <= entry.begin <= entry.begin + entry.size <= len(data) for entry in entries.values())


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    state = to_original("sd3", make("sd3").state_dict())
    lost = {name: tensor for name, tensor in state.items() if name != "joint_blocks.1.x_block.mlp.fc1.weight"}
    save_file(lost, tmp_path / "lost.safetensors")
    with pytest.raises(ModelError, match=r"transformer_blocks.1.ff.net.0.proj.weight is missing"):
        _ = load(tmp_path / "lost.safetensors").models["transformer"]
    save_file({**state, "joint_blocks.0.x_block.strange": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match=r"joint_blocks.0.x_block.strange belong"):
        load(tmp_path / "more.safetensors")
    save_file({**state, "text_encoders.clip_l.x": torch.ones(2)}, tmp_path / "text.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors belong to no submodel .* \[load.parts\]"):
        load(tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match="Stable Diffusion 1, 2 and XL") as caught:
        load(tmp_path / "more.safetensors", ema=True)
    assert "load.ema" in str(caught.value)
