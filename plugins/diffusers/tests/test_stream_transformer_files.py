"""Single files of FLUX.2, Z-Image and Lumina-Image 2.0: names against diffusers' code, what they give against torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts.stages import Match
from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
gguf = pytest.importorskip("gguf")
ov = pytest.importorskip("openvino")

from safetensors.torch import save_file  # noqa: E402

from ovforge_convert import TensorWeight  # noqa: E402
from ovforge_diffusers.components import find_components  # noqa: E402
from ovforge_diffusers.header import Part  # noqa: E402
from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402
from ovforge_diffusers.stored import joined  # noqa: E402
from ovforge_diffusers.transformer_configs import transformer_config  # noqa: E402
from ovforge_diffusers.transformer_names import diffusers_rows  # noqa: E402

Tensors = dict[str, Any]


def neighbour(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"small_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = neighbour("foreign_names")
SMALL = {
    "Flux2Transformer2DModel": {**neighbour("test_flux2").SMALL, "attention_head_dim": 32, "num_attention_heads": 2,
                                "axes_dims_rope": (8, 8, 8, 8), "joint_attention_dim": 64, "in_channels": 32},
    "ZImageTransformer2DModel": {**neighbour("test_zimage").SMALL, "dim": 64, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 32},
    "Lumina2Transformer2DModel": {**neighbour("test_lumina2").SMALL, "hidden_size": 96, "axes_dim_rope": (8, 8, 8), "cap_feat_dim": 32},
}  # fmt: skip
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "Flux2Transformer2DModel": [
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
        {},
    ],
    "ZImageTransformer2DModel": [{}],
    "Lumina2Transformer2DModel": [{"cap_feat_dim": 2304}],
}  # fmt: skip
CODE = {
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
    "Lumina2Transformer2DModel": "convert_lumina2_to_diffusers",
}
KINDS = pytest.mark.parametrize("kind", SMALL)


def original(kind: str, state: Tensors) -> Tensors:
    join: Callable[[list[Any]], Any] = torch.cat
    if kind == "Flux2Transformer2DModel":
        made: Tensors = NAMES.flux2(state, join)
    else:
        made = NAMES.streams(state, join, NAMES.ZIMAGE if kind[0] == "Z" else NAMES.LUMINA2)
    return {name: tensor.clone().contiguous() for name, tensor in made.items()}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    module = getattr(diffusers, kind)(**SMALL[kind]).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module


def load(path: Path, **options: Any) -> ModelBundle:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(path)) is Match.YES
    return loader.load(FileSource(path))


def outcome(bundle: ModelBundle) -> np.ndarray:
    """Return what a transformer gives for some inputs, in float32: the folder's graph is compared with torch elsewhere."""
    model = bundle.models["transformer"]
    rng = np.random.default_rng(0)
    sizes = {
        "hidden_states": {1: 12, 2: 8, 3: 12},
        "img_ids": {1: 32 if "encoder_attention_mask" in str(model.inputs) else 12},
    }
    inputs = {}
    for port in model.inputs:
        name = port.any_name
        shape = [
            side.get_length() if side.is_static else 1 if axis == 0 else sizes.get(name, {}).get(axis, 32)
            for axis, side in enumerate(port.partial_shape)
        ]
        kind = port.element_type.to_dtype()
        inputs[name] = rng.integers(1, 5, shape).astype(kind) if "ids" in name else rng.random(shape).astype(kind)
    if bundle.configs["transformer"]["_class_name"] == "Lumina2Transformer2DModel":
        inputs["img_ids"] = inputs["img_ids"][:, :24]
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(model, "CPU", options)
    result: np.ndarray = compiled(inputs)[0]
    assert np.isfinite(result).all() and result.std() > 1e-3
    return result


@KINDS
def test_names_are_those_of_diffusers_own_conversion(kind: str) -> None:
    """With the real widths, which diffusers' code takes for granted in part, and one column."""
    code = pytest.importorskip("diffusers.loaders.single_file_utils")
    few = {"n_layers": 1, "n_refiner_layers": 1} if kind[0] == "Z" else {"num_layers": 1}
    more = {"num_single_layers": 1} if kind[0] == "F" else {"num_refiner_layers": 2} if kind[0] == "L" else {}
    with torch.device("meta"):
        module = getattr(diffusers, kind)(**{**PUBLISHED[kind][0], **few, **more})
    state = {
        name: torch.randn(*tensor.shape[:1], *(1 for _ in tensor.shape[1:]))
        for name, tensor in module.state_dict().items()
    }
    file = original(kind, state)
    wanted = getattr(code, CODE[kind])(dict(file))
    rows = diffusers_rows(kind, {name: tuple(tensor.shape) for name, tensor in file.items()})
    ours = joined({name: TensorWeight(tensor) for name, tensor in file.items()}, rows)
    assert ours.keys() == wanted.keys() == state.keys()
    for name, tensor in wanted.items():
        out = np.empty(ours[name].shape, np.float32)
        ours[name].fill(out)
        np.testing.assert_array_equal(out, tensor.numpy(), err_msg=name)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*does not say whether it is distilled")
@KINDS
def test_a_file_gives_what_its_folder_gives(tmp_path: Path, kind: str) -> None:
    """In both namings, with ComfyUI's prefix, in scaled float8, and as GGUF; a folder alone opens, too."""
    module = make(kind)
    module.save_pretrained(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    wanted = outcome(folder)
    own = original(kind, module.state_dict())
    files: dict[str, Tensors] = {
        "makers": {f"model.diffusion_model.{name}": tensor for name, tensor in own.items()},
        "diffusers": module.state_dict(),
    }
    if kind[0] != "F":
        files["makers"]["model.diffusion_model.norm_final.weight"] = torch.ones(4)  # trained, and not used
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        bundle = load(tmp_path / f"{name}.safetensors")
        np.testing.assert_allclose(outcome(bundle), wanted, atol=1e-5 * np.abs(wanted).max())
        found, said = bundle.configs["transformer"], folder.configs["transformer"]
        rules = {"multiple_of", "ffn_dim_multiplier", "axes_lens", "sample_size", "all_patch_size", "all_f_patch_size"}
        told = {key for key in said.keys() - rules if key[0] != "_"}
        assert {key: found[key] for key in told} == {key: said[key] for key in told}
    _check_float8(tmp_path, own)
    _check_gguf(tmp_path, own)


def _check_float8(folder: Path, own: Tensors) -> None:
    file, rounded = {}, {}
    mark = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    for name, tensor in own.items():
        if tensor.ndim != 2 or ("blocks" not in name and "layers" not in name):
            file[name] = rounded[name] = tensor
            continue
        scale, stem = tensor.abs().max() / 400, name.removesuffix(".weight")
        file[name] = (tensor / scale).to(torch.float8_e4m3fn)
        rounded[name] = file[name].float() * scale
        file |= {
            f"{stem}.weight_scale": scale,
            f"{stem}.input_scale": torch.ones(()),
            f"{stem}.comfy_quant": mark.clone(),
        }
    save_file(file, folder / "fp8.safetensors")
    save_file(rounded, folder / "rounded.safetensors")
    wanted = outcome(load(folder / "rounded.safetensors"))
    np.testing.assert_allclose(outcome(load(folder / "fp8.safetensors")), wanted, atol=1e-5 * np.abs(wanted).max())


def _check_gguf(folder: Path, own: Tensors) -> None:
    """Write it as ComfyUI-GGUF does: matrices in eight bits; those that are taken apart stay compressed."""
    writer = gguf.GGUFWriter(folder / "file.gguf", "lumina2")
    held = {}
    for name, tensor in own.items():
        number = gguf.GGMLQuantizationType["Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"]
        data = gguf.quants.quantize(tensor.numpy(), number)
        held[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, number))).reshape(tensor.shape)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(held, folder / "held.safetensors")
    wanted = outcome(load(folder / "held.safetensors"))
    np.testing.assert_allclose(outcome(load(folder / "file.gguf")), wanted, atol=1e-5 * np.abs(wanted).max())
    with pytest.warns(UserWarning, match=r"tensors of Q8_0 do not stay compressed"):
        half = load(folder / "file.gguf", weights="f16")
    np.testing.assert_allclose(outcome(half), wanted, atol=1e-2 * np.abs(wanted).max())
    types = [
        n.get_element_type().get_type_name()
        for n in half.models["transformer"].get_ops()
        if n.get_type_name() == "Constant"
    ]
    assert types.count("i8") > 10


@KINDS
def test_published_transformers_are_known_by_their_shapes(kind: str) -> None:
    for facts in PUBLISHED[kind]:
        with torch.device("meta"):
            module = getattr(diffusers, kind)(**facts)
        state = module.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in original(kind, state).items()}
        assert find_components(shapes) == {"transformer": Part(kind, "", "original")}
        rows = diffusers_rows(kind, shapes)
        named = {new: (sum(e - b for _, b, e in rs), *shapes[rs[0][0]][1:]) for new, rs in rows.items()}
        assert named == {name: tuple(tensor.shape) for name, tensor in state.items()}
        told, ours = json.loads(json.dumps(dict(module.config))), transformer_config(kind, named)
        assert {key: value for key, value in ours.items() if key[0] != "_"} == {
            key: told[key] for key in ours if key[0] != "_"
        }


def test_what_is_not_known_of_flux2_is_said(tmp_path: Path) -> None:
    """Whether it is distilled, which its name tells, or a folder."""
    save_file(
        original("Flux2Transformer2DModel", make("Flux2Transformer2DModel").state_dict()),
        tmp_path / "flux-2-klein-4b.safetensors",
    )
    with pytest.warns(UserWarning, match="does not say whether it is distilled: by its name it is"):
        bundle = load(tmp_path / "flux-2-klein-4b.safetensors")
    assert bundle.index["is_distilled"] is True
    (tmp_path / "flux-2-klein-4b.safetensors").rename(tmp_path / "flux-2-klein-base-4b.safetensors")
    with pytest.warns(UserWarning, match="by its name it is not"):
        bundle = load(tmp_path / "flux-2-klein-base-4b.safetensors")
    assert bundle.index["is_distilled"] is False
    make("Flux2Transformer2DModel").save_config(tmp_path / "pipe/transformer")
    index = {
        "_class_name": "Flux2KleinPipeline", "is_distilled": True, "transformer": ["diffusers", "Flux2Transformer2DModel"],
    }  # fmt: skip
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    assert load(tmp_path / "flux-2-klein-base-4b.safetensors", config=tmp_path / "pipe").index["is_distilled"] is True


@KINDS
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, kind: str) -> None:
    own = original(kind, make(kind).state_dict())
    block = "double_blocks.0.img_mlp.0.weight" if kind[0] == "F" else "layers.0.feed_forward.w1.weight"
    save_file({**own, block.replace(".weight", ".strange"): torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match=r"strange belong"):
        load(tmp_path / "more.safetensors")
    attention = next(name for name in own if ".qkv." in name)
    save_file({**own, attention: own[attention][:-3].clone()}, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError) as caught:
        _ = load(tmp_path / "cut.safetensors").models["transformer"]
    assert str(tmp_path) in str(caught.value)
