"""ControlNets, and components that stand alone: converted, put into pipelines, against diffusers."""

from __future__ import annotations

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
ov = pytest.importorskip("openvino")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402


def make_controlnet(seed: int = 0, **changes: Any) -> Any:
    """Return a small ControlNet whose last convolutions are not zero, as those of a fresh one are."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32,
        "conditioning_embedding_out_channels": (8, 16),
    }  # fmt: skip
    net = diffusers.ControlNetModel(**{**shape, **changes}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return net


def open_folder(folder: Path, **options: Any) -> ModelBundle:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(folder)) is Match.YES
    return loader.load(FileSource(folder))


def run(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled({name: value.numpy() for name, value in inputs.items()})
    return {port.any_name: result[port] for port in compiled.outputs}


def close(ours: np.ndarray, theirs: Any, bound: float = 1e-4) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def inputs_of(rows: int, height: int, width: int, tokens: int = 77) -> dict[str, Any]:
    random = torch.Generator().manual_seed(height)
    return {
        "sample": torch.randn(rows, 4, height, width, generator=random),
        "timestep": torch.tensor([601]),
        "encoder_hidden_states": torch.randn(rows, tokens, 32, generator=random),
        "controlnet_cond": torch.rand(rows, 3, 2 * height, 2 * width, generator=random),
    }


VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bgr": {"controlnet_conditioning_channel_order": "bgr", "global_pool_conditions": True},
    "xl": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 16 + 6 * 4, "transformer_layers_per_block": (2, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_controlnet_gives_what_torch_gives_at_every_size(tmp_path: Path, variety: str) -> None:
    net = make_controlnet(**VARIETIES[variety])
    net.save_pretrained(tmp_path)
    bundle = open_folder(tmp_path)
    assert list(bundle.models) == ["controlnet"]
    assert bundle.configs["controlnet"]["_class_name"] == "ControlNetModel"
    for rows, height, width, tokens in ((1, 8, 8, 77), (3, 6, 12, 154), (2, 7, 9, 77)):
        inputs = inputs_of(rows, height, width, tokens)
        added = {}
        if variety == "xl":
            added = {"text_embeds": torch.randn(rows, 16), "time_ids": torch.randn(rows, 6)}
        down, middle = net(**inputs, added_cond_kwargs=added, return_dict=False)
        ours = run(bundle.models["controlnet"], {**inputs, **added})
        assert list(ours) == [*(f"down_block_res_sample_{i}" for i in range(len(down))), "mid_block_res_sample"]
        for mine, wanted in zip(ours.values(), [*down, middle], strict=True):
            close(mine, wanted)


def test_the_controlnets_of_a_pipeline(copy: Path, write_index: Callable[..., None]) -> None:
    """As diffusers saves one, and several; and by a list."""
    nets = [make_controlnet(seed) for seed in (0, 1)]
    diffusers.MultiControlNetModel(nets).save_pretrained(str(copy / "controlnet"))
    one, other = ["diffusers", "ControlNetModel"], ["diffusers.pipelines.controlnet", "MultiControlNetModel"]
    for value, roles in ((one, 1), (other, 2), ([one, one], 2)):
        write_index(copy, _class_name="StableDiffusionControlNetPipeline", controlnet=value)
        bundle = open_folder(copy)
        found = [role for role in bundle.models if "controlnet" in role]
        assert found == ["controlnet", "controlnet_1"][:roles]
    inputs = inputs_of(1, 4, 4)
    for role, net in zip(found, nets, strict=True):
        close(run(bundle.models[role], inputs)["mid_block_res_sample"], net(**inputs).mid_block_res_sample)
    fixed = open_folder(copy, height=16, width=24, batch=2).models["controlnet_1"]
    assert {port.any_name: list(port.shape) for port in fixed.inputs} == {
        "sample": [4, 4, 8, 12], "timestep": [1], "encoder_hidden_states": [4, 77, 32], "controlnet_cond": [4, 3, 16, 24],
    }  # fmt: skip
    with pytest.warns(UserWarning, match="controlnet .* is left out"), pytest.warns(UserWarning, match="controlnet_1"):
        left = open_folder(copy, skip=("controlnet", "controlnet_1"))
    assert not [role for role in left.models if "controlnet" in role]


def test_an_autoencoder_or_a_unet_alone(pipeline: Path) -> None:
    whole = open_folder(pipeline)
    autoencoder, unet = open_folder(pipeline / "vae"), open_folder(pipeline / "unet")
    assert list(autoencoder.models) == ["vae_encoder", "vae_decoder"]
    assert list(unet.models) == ["unet"]
    latents = {"latent_sample": torch.randn(1, 4, 5, 7)}
    mine, wanted = (run(each.models["vae_decoder"], latents)["sample"] for each in (autoencoder, whole))
    np.testing.assert_array_equal(mine, wanted)
    assert unet.configs["unet"] == whole.configs["unet"]
    assert autoencoder.configs["vae_decoder"] == whole.configs["vae_decoder"]


def test_a_refiners_unet_alone_is_known(copy: Path) -> None:
    config = json.loads((copy / "unet/config.json").read_text())
    config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "time_cond_proj_dim": None}
    for width, ids in ((32, 5), (40, 6)):
        config |= {"projection_class_embeddings_input_dim": width + 8 * ids}
        diffusers.UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
        shapes = {p.any_name: p.partial_shape for p in open_folder(copy / "unet").models["unet"].inputs}
        assert shapes["time_ids"] == ov.PartialShape([-1, ids])
        assert shapes["text_embeds"] == ov.PartialShape([-1, width])


def test_what_is_wrong_with_a_lone_folder_is_said(tmp_path: Path) -> None:
    make_controlnet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        open_folder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").rename(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(ModelError, match="do not fit the config") as caught:
        _ = open_folder(tmp_path).models["controlnet"]
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({**config, "class_embed_type": "timestep"}))
    with pytest.raises(ModelError, match="class_embed_type"):
        _ = open_folder(tmp_path).models["controlnet"]
    loader = DiffusersLoader(LoaderOptions())
    for text in (json.dumps({**config, "_class_name": "ControlNetUnionModel"}), "{", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert loader.can_load(FileSource(tmp_path)) is Match.NO
