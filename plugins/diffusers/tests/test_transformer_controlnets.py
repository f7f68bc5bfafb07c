"""ControlNets of diffusion transformers: folders and single files, converted, against torch."""

from __future__ import annotations

import contextlib
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
ov = pytest.importorskip("openvino")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

WIDTH = 32
SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": 48,
    "pos_embed_max_size": 24, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
}  # fmt: skip
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
QWENIMAGE: dict[str, Any] = {
    "in_channels": 64, "out_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3,
    "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
SANA: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 24,
    "sample_size": 16,
}  # fmt: skip
ZIMAGE: dict[str, Any] = {
    "dim": 48, "n_heads": 3, "n_kv_heads": 3, "n_refiner_layers": 2, "control_in_dim": 16,
    "control_layers_places": [0, 2],
}  # fmt: skip
ZIMAGE_KEPT = ("control_layers_places", "add_control_noise_refiner", "control_refiner_layers_places", "control_in_dim",
               "dim", "n_heads", "n_kv_heads")  # fmt: skip
VARIETIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3ControlNetModel", SD3),
    "sd3-inpainting": ("SD3ControlNetModel", {**SD3, "extra_conditioning_channels": 1}),
    # Of Stable Diffusion 3.5 large: no text, and the transformer's own embedding of the latents.
    "sd3-large": ("SD3ControlNetModel", {
        **SD3, "joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None, "dual_attention_layers": (),
        "qk_norm": None, "force_zeros_for_pooled_projection": False,
    }),
    "flux": ("FluxControlNetModel", {**FLUX, "num_layers": 2, "guidance_embeds": True}),
    "flux-union": ("FluxControlNetModel", {**FLUX, "num_mode": 3, "num_single_layers": 2, "guidance_embeds": True}),
    "flux-double": ("FluxControlNetModel", {**FLUX, "num_layers": 2, "num_single_layers": 0}),
    "flux-xlabs": ("FluxControlNetModel", {
        **FLUX, "num_layers": 2, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 16,
        "guidance_embeds": True,
    }),
    "qwenimage": ("QwenImageControlNetModel", {**QWENIMAGE, "num_layers": 2}),
    "qwenimage-inpainting": ("QwenImageControlNetModel", {**QWENIMAGE, "extra_condition_channels": 4}),
    "sana": ("SanaControlNetModel", SANA),
    "zimage": ("ZImageControlNetModel", ZIMAGE),
    "zimage-refined": ("ZImageControlNetModel", {
        **ZIMAGE, "control_in_dim": 33, "add_control_noise_refiner": "control_noise_refiner",
        "control_refiner_layers_places": [0, 1],
    }),
    "zimage-shared": ("ZImageControlNetModel", {
        **ZIMAGE, "add_control_noise_refiner": "control_layers", "control_refiner_layers_places": [0, 1],
    }),
}  # fmt: skip
"""Name -> class, config."""


def make_controlnet(variety: str, seed: int = 0, **changes: Any) -> Any:
    """Return a small ControlNet all of whose weights are random: a fresh one adds nothing."""
    torch.manual_seed(seed)
    kind, config = VARIETIES[variety]
    net = getattr(diffusers, kind)(**{**config, **changes}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return net


def open_source(path: Path, **options: Any) -> ModelBundle:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(path)) is Match.YES
    return loader.load(FileSource(path))


def run(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
    )
    result = compiled({name: np.asarray(value) for name, value in inputs.items()})
    return {port.any_name: result[port] for port in compiled.outputs}


def inputs_of(net: Any, rows: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    """Return inputs for latents of a size, by the names of the converted model."""
    random = torch.Generator().manual_seed(height)
    config, kind = net.config, type(net).__name__

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=random)

    states = {"encoder_hidden_states": draw(rows, tokens, config.get("joint_attention_dim") or 24)}
    if kind in ("SD3ControlNetModel", "SanaControlNetModel"):
        shape = (rows, config.in_channels, height, width)
        common = {"hidden_states": draw(*shape), "timestep": torch.rand(rows, generator=random) * 1000}
        if kind == "SanaControlNetModel":
            mask = torch.ones(rows, tokens)
            mask[0, -1] = 0
            return {**common, **states, "encoder_attention_mask": mask, "controlnet_cond": draw(*shape)}
        extra = config.extra_conditioning_channels
        if not config.use_pos_embed:
            common["hidden_states"] = draw(rows, height * width // 4, net.inner_dim)
        pooled = {"pooled_projections": draw(rows, config.pooled_projection_dim)}
        condition = {"controlnet_cond": draw(rows, config.in_channels + extra, height, width)}
        return {**common, **pooled, **condition, **(states if config.joint_attention_dim else {})}
    packed = height * width // 4
    common = {"hidden_states": draw(rows, packed, 64), "timestep": torch.rand(rows, generator=random), **states}
    if kind == "QwenImageControlNetModel":
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[0, -1] = 0
        sides = {"height": torch.tensor(height // 2), "width": torch.tensor(width // 2)}
        extra = config.extra_condition_channels
        condition = {"controlnet_cond": draw(rows, packed, 64 + extra)}
        return {**common, "encoder_hidden_states_mask": mask, **sides, **condition}
    places = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2)).float()
    shown = config.conditioning_embedding_channels is not None
    return {
        **common, "pooled_projections": draw(rows, 24), "img_ids": places, "txt_ids": torch.zeros(tokens, 3),
        "controlnet_cond": draw(rows, 3, 8 * height, 8 * width) if shown else draw(rows, packed, 64),
        **({"controlnet_mode": torch.arange(rows)[:, None] % 3} if config.num_mode else {}),
        **({"guidance": torch.full((rows,), 3.5)} if config.guidance_embeds else {}),
    }  # fmt: skip


def wanted_of(net: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what diffusers gives, by the names of the converted model."""
    given = dict(inputs)
    if type(net).__name__ == "QwenImageControlNetModel":
        rows = len(given["hidden_states"])
        given["img_shapes"] = [(1, int(given.pop("height")), int(given.pop("width")))] * rows
    with torch.no_grad():
        output = net(**given)
    named = {
        "controlnet_block_samples_": output.controlnet_block_samples,
        "controlnet_single_block_samples_": getattr(output, "controlnet_single_block_samples", None),
    }
    return {f"{name}{n}": sample for name, samples in named.items() for n, sample in enumerate(samples or ())}


def check(model: Any, net: Any) -> None:
    for rows, height, width, tokens in ((1, 8, 8, 9), (3, 4, 14, 21), (2, 22, 6, 2)):
        inputs = inputs_of(net, rows, height, width, tokens)
        ours, theirs = run(model, inputs), wanted_of(net, inputs)
        assert list(ours) == list(theirs)
        for name, wanted in theirs.items():
            difference = np.abs(ours[name] - wanted.numpy()).max()
            assert difference <= 1e-4 * wanted.abs().max(), name
            assert ours[name].shape == wanted.shape


@pytest.mark.parametrize("variety", ["sd3", "flux-union", "sana"])  # the others below, from single files
def test_a_controlnet_gives_what_torch_gives_at_every_size(tmp_path: Path, variety: str) -> None:
    net = make_controlnet(variety)
    net.save_pretrained(tmp_path)
    bundle = open_source(tmp_path)
    assert list(bundle.models) == ["controlnet"]
    assert bundle.configs["controlnet"]["_class_name"] == VARIETIES[variety][0]
    check(bundle.models["controlnet"], net)


@pytest.mark.parametrize("variety", [name for name in VARIETIES if not name.startswith(("sana", "zimage"))])
def test_a_single_file_is_what_the_folder_is(tmp_path: Path, variety: str) -> None:
    """In diffusers' naming; its config is inferred, heads of 64 channels where nothing says how wide they are."""
    heads: dict[str, Any] = {"attention_head_dim": 64, "num_attention_heads": 1, "axes_dims_rope": (8, 28, 28)}
    if variety.startswith("sd3"):
        heads = {"attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64, "sample_size": 128}
    net = make_controlnet(variety, **heads)
    net.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    alone = file.rename(tmp_path / "alone.safetensors")
    if variety in ("sd3",):
        with pytest.warns(UserWarning, match="pooled states"):
            bundle = open_source(alone)
    else:
        bundle = open_source(alone)
    check(bundle.models["controlnet"], net)
    inferred = bundle.configs["controlnet"]
    kept = ("num_layers", "num_single_layers", "extra_conditioning_channels", "extra_condition_channels", "num_mode",
            "use_pos_embed", "force_zeros_for_pooled_projection", "guidance_embeds", "conditioning_embedding_channels")  # fmt: skip
    assert {name: inferred.get(name) for name in kept} == {name: net.config.get(name) for name in kept}


def test_other_namings_are_refused_by_name(tmp_path: Path) -> None:
    """XLabs' own has the names of FLUX's makers."""
    from safetensors.torch import save_file

    names = ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "img_in.weight", "txt_in.weight",
             "controlnet_blocks.0.weight", "input_hint_block.0.weight")  # fmt: skip
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="not one of diffusers'"):
        open_source(tmp_path / "net.safetensors")


@pytest.mark.parametrize("variety", ["zimage", "zimage-refined", "zimage-shared"])
def test_a_single_file_of_z_image(tmp_path: Path, variety: str) -> None:
    """Its layers stand at even distances; version 2.0 brings refiners of zeros, which are not used."""
    from safetensors.torch import load_file, save_file

    places = {"control_layers_places": list(range(0, 30, 2)), "control_in_dim": 16 if variety == "zimage" else 33}
    net = make_controlnet(variety, **places)
    net.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    if variety == "zimage-shared":
        other = make_controlnet("zimage-refined", **places).state_dict()
        tensors |= {name: torch.zeros_like(other[name]) for name in other if name.startswith("control_noise_refiner.")}
    save_file(tensors, tmp_path / "alone.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "config.json").rename(tmp_path / "config")
    said = pytest.warns(UserWarning, match="36 tensors belong to no submodel")
    with said if variety == "zimage-shared" else contextlib.nullcontext():
        opened = open_source(tmp_path / "alone.safetensors")
    inferred = opened.configs["controlnet"]
    assert {name: inferred[name] for name in ZIMAGE_KEPT} == {name: net.config[name] for name in ZIMAGE_KEPT}
    refined = 0 if variety == "zimage" else 2
    assert len(opened.models["controlnet"].outputs) == 15 + refined
