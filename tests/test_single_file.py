"""Single-file checkpoints: each family written in the original naming, opened, and compared with its folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from ovforge import Use
from ovforge.bundle import ModelBundle
from ovforge.cache import Cache
from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge.plugins import Plugins
from ovforge.sources import FileSource
from ovforge.stages import Match

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("ovforge_diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from ovforge_diffusers.checkpoint import Checkpoint  # noqa: E402
from ovforge_diffusers.families import identify  # noqa: E402
from ovforge_diffusers.header import Header, Part, find_parts  # noqa: E402
from ovforge_diffusers.infer import controlnet_config, guessed, text_config, unet_config, vae_config  # noqa: E402
from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402
from ovforge_diffusers.vocabulary import clip_files, packaged_merges  # noqa: E402

Folder = Callable[[str], Path]
Tensors = dict[str, Any]

# -- the original naming, written down apart from the code under test ------------------------------------------------

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0", "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    "controlnet_mid_block": "middle_block_out.0",
}  # fmt: skip


def unet_to_original(state: Mapping[str, Any], layers: int) -> Tensors:
    """Rename a UNet's or a ControlNet's tensors to CompVis' names."""
    attended = {int(m[1]) for name in state if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def rename(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in UNET_TOP:
            return f"{UNET_TOP[module]}.{kind}"
        if m := re.match(r"controlnet_down_blocks\.(\d+)", name):
            return f"zero_convs.{m[1]}.0.{kind}"
        if m := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)", name):
            return f"input_hint_block.{2 * int(m[1]) + 2}.{kind}"
        if m := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
            return f"middle_block.{2 * int(m[2]) + (m[1] == 'attentions')}.{inner(m[1], m[3])}"
        m = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
        assert m, name
        down, level, what, number = m[1] == "down", int(m[2]), m[3], int(m[4])
        entry = (level * (layers + 1) + number) + (1 if down else 0)
        if what == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{kind}"
        if what == "upsamplers":
            return f"output_blocks.{level * (layers + 1) + layers}.{2 if level in attended else 1}.conv.{kind}"
        return f"{'input' if down else 'output'}_blocks.{entry}.{int(what == 'attentions')}.{inner(what, m[5])}"

    def inner(what: str, rest: str) -> str:
        if what == "attentions":
            return rest
        module, _, kind = rest.rpartition(".")
        return f"{RESNET[module]}.{kind}"

    return {rename(name): tensor for name, tensor in state.items()}


def vae_to_original(state: Mapping[str, Any], levels: int) -> Tensors:
    """Rename an autoencoder's tensors to CompVis' names; its attention was made of 1x1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def rename(name: str) -> str:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for new, old in attention.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
        return name

    return {
        rename(name): tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def clip_to_open_clip(state: Mapping[str, Any], *, unused_layer: bool) -> Tensors:
    """Rename CLIP's tensors to OpenCLIP's, whose attention has one matrix for query, key and value."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    made = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.zeros(()),
    }
    width = made["positional_embedding"].shape[1]
    projection = state.get("text_projection.weight")
    made["text_projection"] = torch.zeros(width, width) if projection is None else projection.T.contiguous()
    layers = 1 + max(int(m[1]) for name in state if (m := re.match(r"encoder\.layers\.(\d+)", name)))
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            made[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
            made[f"{theirs}.attn.out_proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
            for name, old in names.items():
                made[f"{theirs}.{old}.{kind}"] = state[f"{ours}.{name}.{kind}"]
    if unused_layer:
        last = {
            name: tensor for name, tensor in made.items() if name.startswith(f"transformer.resblocks.{layers - 1}.")
        }
        made |= {n.replace(f".{layers - 1}.", f".{layers}."): torch.ones_like(t) for n, t in last.items()}
    return made


def weights_of(folder: Path) -> Tensors:
    [file] = folder.glob("*.safetensors")
    return {name: tensor for name, tensor in load_file(file).items() if not name.endswith("position_ids")}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def original(folder: Path, family: str) -> Tensors:
    """Return a pipeline's folder as the tensors of one checkpoint."""
    unet, vae = config_of(folder / "unet"), config_of(folder / "vae")
    parts = {
        "model.diffusion_model.": unet_to_original(weights_of(folder / "unet"), unet["layers_per_block"]),
        "first_stage_model.": vae_to_original(weights_of(folder / "vae"), len(vae["block_out_channels"])),
    }
    if family in ("sd1", "inpaint", "lcm"):
        parts["cond_stage_model.transformer.text_model."] = clip_weights(folder / "text_encoder")
    elif family == "sd2":
        parts["cond_stage_model.model."] = clip_to_open_clip(weights_of(folder / "text_encoder"), unused_layer=True)
    else:
        if family == "xl":
            parts["conditioner.embedders.0.transformer.text_model."] = clip_weights(folder / "text_encoder")
        second = clip_to_open_clip(weights_of(folder / "text_encoder_2"), unused_layer=False)
        parts[f"conditioner.embedders.{int(family == 'xl')}.model."] = second
    return {prefix + name: tensor.contiguous() for prefix, part in parts.items() for name, tensor in part.items()}


def clip_weights(folder: Path) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in weights_of(folder).items()}


# -- small models that follow the families' rules ----------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def by_rule(source: Path, target: Path, family: str) -> Path:
    """Copy a small family, with heads, groups and padding as the published models have them; weights stay."""
    shutil.copytree(source, target)
    unet = config_of(target / "unet")
    linear = unet["use_linear_projection"]
    heads = [1] * len(unet["block_out_channels"]) if linear else 8
    edit(target / "unet/config.json", attention_head_dim=heads, norm_num_groups=16, upcast_attention=False)
    for encoder in ("text_encoder", "text_encoder_2"):
        if (target / encoder).is_dir():
            act = "gelu" if encoder == "text_encoder_2" or family == "sd2" else "quick_gelu"
            edit(target / encoder / "config.json", num_attention_heads=1, hidden_act=act)
    for tokenizer in ["tokenizer"] * (family == "sd2") + ["tokenizer_2"] * (family in ("xl", "refiner")):
        edit(target / tokenizer / "tokenizer_config.json", pad_token="!")
    return target


FAMILIES = ("sd1", "sd2", "inpaint", "xl", "refiner", "lcm")
KNOWN = pytest.mark.filterwarnings("ignore:.*guessed", "ignore:.*does not say what its UNet predicts")


@pytest.fixture(scope="module")
def small(
    torch_family: Folder, torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that gives a family's folder and its single file, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            place = tmp_path_factory.mktemp(f"single-{family}")
            source = torch_lcm if family == "lcm" else torch_family(family)
            folder = by_rule(source, place / "folder", family)
            (place / "file").mkdir()
            save_file(original(folder, family), place / "file/model.safetensors")
            tokenizer = "tokenizer_2" if family == "refiner" else "tokenizer"
            shutil.copytree(folder / tokenizer, place / "file/tokenizer")
            made[family] = folder, place / "file/model.safetensors"
        return made[family]

    return get


def options(**changes: Any) -> LoaderOptions:
    return LoaderOptions(**{"weights": "f32", **changes})


def load(source: Path, **changes: Any) -> ModelBundle:
    return DiffusersLoader(options(**changes)).load(FileSource(source))


def as_module(kind: str, config: dict[str, Any], weights: Tensors) -> Any:
    """Make a torch module of a config and weights, all of them, and no other."""
    cls = getattr(transformers if kind.startswith("CLIP") else diffusers, kind)
    module = cls(cls.config_class.from_dict(config)) if kind.startswith("CLIP") else cls.from_config(config)
    if "embeddings.token_embedding.weight" in module.state_dict():
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    module.load_state_dict(weights, strict=True)
    return module.eval()


def outputs(module: Any) -> list[np.ndarray]:
    """Run a module on random inputs."""
    torch.manual_seed(0)
    config = module.config
    with torch.no_grad():
        if isinstance(module, diffusers.AutoencoderKL):
            moments = module.encode(torch.randn(1, 3, 16, 16)).latent_dist.parameters
            return [moments.numpy(), module.decode(torch.randn(1, 4, 4, 4)).sample.numpy()]
        if isinstance(module, diffusers.UNet2DConditionModel):
            added = {}
            if config.addition_embed_type:
                numbers = 5 if config.cross_attention_dim == 24 else 6
                text = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
                added = {"text_embeds": torch.randn(1, text), "time_ids": torch.rand(1, numbers) * 1024}
            sample, states = torch.randn(1, config.in_channels, 8, 8), torch.randn(1, 7, config.cross_attention_dim)
            guidance = torch.randn(1, config.time_cond_proj_dim) if config.time_cond_proj_dim else None
            out = module(sample, torch.tensor([37]), states, timestep_cond=guidance, added_cond_kwargs=added)
            return [out.sample.numpy()]
        ids = torch.tensor([[config.vocab_size - 2, 5, 9, config.vocab_size - 1, 0, 0]])
        out = module(ids, output_hidden_states=True)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return [out.last_hidden_state.numpy(), pooled.numpy(), *(each.numpy() for each in out.hidden_states)]


@KNOWN
@pytest.mark.parametrize("family", FAMILIES)
def test_inferred_configs_and_renamed_weights_are_the_folders(
    small: Callable[[str], tuple[Path, Path]], family: str
) -> None:
    """Every submodel computes the same, to the bit; the index and the noise schedule are the folder's."""
    folder, file = small(family)
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(file)) is Match.YES
    checkpoint, index = Checkpoint(FileSource(file), options()), json.loads((folder / "model_index.json").read_text())
    assert {name for name, value in checkpoint.index.items() if isinstance(value, list) and value[1]} == {
        name for name, value in index.items() if isinstance(value, list) and value[1]
    }
    for name in ("_class_name", "requires_aesthetics_score", "force_zeros_for_empty_prompt"):
        assert checkpoint.index.get(name) == index.get(name)
    for component, kind in checkpoint.components.items():
        if component == "scheduler":
            scheduler, theirs = (json.loads(data) for data in (
                *checkpoint.assets("scheduler").values(), (folder / "scheduler/scheduler_config.json").read_bytes()
            ))  # fmt: skip
            for name in (
                "beta_start",
                "beta_end",
                "beta_schedule",
                "clip_sample",
                "set_alpha_to_one",
                "prediction_type",
            ):
                assert scheduler[name] == theirs[name]
        elif kind == "CLIPTokenizer":
            files = checkpoint.assets(component)
            assert files[f"{component}/vocab.json"] == (folder / component / "vocab.json").read_bytes()
            ours = json.loads(files[f"{component}/tokenizer_config.json"])
            theirs = json.loads((folder / component / "tokenizer_config.json").read_bytes())
            assert {name: ours[name] for name in theirs} == theirs
        else:
            ours = as_module(kind, checkpoint.config(component), checkpoint.weights(component)())
            theirs = as_module(kind, config_of(folder / component), weights_of(folder / component))
            for mine, wanted in zip(outputs(ours), outputs(theirs), strict=True):
                np.testing.assert_array_equal(mine, wanted)


PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("text-to-image", {"width": 24, "height": 32}),
    "sd2": ("text-to-image", {"width": 16, "height": 16}),
    "inpaint": ("inpainting", {"image": "white", "mask": "hole"}),
    "xl": ("text-to-image", {"width": 16, "height": 24}),
    "refiner": ("image-to-image", {"image": "white", "strength": 0.6}),
}


@KNOWN
@pytest.mark.parametrize("family", PICTURES)
def test_pictures_of_a_single_file_are_those_of_the_folder(
    small: Callable[[str], tuple[Path, Path]], torch_family: Folder, session_cache: Cache, family: str
) -> None:
    """With configs by the option `config`, whose folder's own weights are not read."""
    task, inputs = PICTURES[family]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    mask = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
    inputs = {name: {"white": image, "hole": mask}.get(value, value) for name, value in inputs.items()}  # type: ignore[call-overload]
    results = [
        ovforge.Pipeline(task, source=source, load=load_options, device=F32, cache=session_cache, scheduler=DDIM)(
            "a pink unicorn", steps=3, seed=5, **inputs
        )
        for source, load_options in (
            (small(family)[1], {"weights": "f32", "config": torch_family(family)}),
            (torch_family(family), {"weights": "f32"}),
        )
    ]
    mine, wanted = (np.asarray(result.images[0]) for result in results)
    assert mine.std() > 5
    np.testing.assert_array_equal(mine, wanted)


F32 = Use("cpu", precision="f32")
DDIM = Use("diffusers", class_name="DDIMScheduler")


# -- configs of the published models ------------------------------------------------------------------------------------

LEVELS = {"D": "DownBlock2D", "A": "CrossAttnDownBlock2D"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {
        "block_out_channels": [320, 640, 1280, 1280], "down_block_types": "AAAD", "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "Stable Diffusion 1.5 inpainting": {
        "block_out_channels": [320, 640, 1280, 1280], "down_block_types": "AAAD", "cross_attention_dim": 768,
        "attention_head_dim": 8, "in_channels": 9,
    },
    "LCM Dreamshaper": {
        "block_out_channels": [320, 640, 1280, 1280], "down_block_types": "AAAD", "cross_attention_dim": 768,
        "attention_head_dim": 8, "time_cond_proj_dim": 256,
    },
    "Stable Diffusion 2.1": {
        "block_out_channels": [320, 640, 1280, 1280], "down_block_types": "AAAD", "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "sample_size": 96,
    },
    "SDXL base": {
        "block_out_channels": [320, 640, 1280], "down_block_types": "DAA", "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "sample_size": 128,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SDXL refiner": {
        "block_out_channels": [384, 768, 1536, 1536], "down_block_types": "DAAD", "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24], "use_linear_projection": True, "transformer_layers_per_block": 4,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "sample_size": 128,
        "projection_class_embeddings_input_dim": 2560,
    },
}  # fmt: skip
"""Facts of the published UNets' configs."""


def published(name: str) -> dict[str, Any]:
    config = {
        "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "time_cond_proj_dim": None,
        "use_linear_projection": False, "transformer_layers_per_block": 1, "sample_size": 64, **PUBLISHED[name],
    }  # fmt: skip
    downs = [LEVELS[letter] for letter in config["down_block_types"]]
    ups = [kind.replace("Down", "Up") for kind in reversed(downs)]
    return {**config, "down_block_types": downs, "up_block_types": ups}


def shapes_of(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make().state_dict()


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_unets_are_known_by_their_shapes(name: str, naming: str) -> None:
    """Also alone, without the text encoders."""
    wanted = published(name)
    state = on_meta(lambda: diffusers.UNet2DConditionModel.from_config(wanted))
    prefix = "model.diffusion_model." if naming == "original" else ""
    shapes = shapes_of(unet_to_original(state, 2) if naming == "original" else state, prefix)
    assert find_parts(shapes) == {"unet": Part("UNet2DConditionModel", prefix, naming)}
    header = Header(shapes, {})
    family = identify(find_parts(shapes), header, "model.safetensors", None)
    refiner = family.name == "refiner"
    size = family.size // 8
    assert refiner == ("refiner" in name)
    assert family.inpainting == ("inpainting" in name)
    assert family.consistency == ("LCM" in name)
    ours = unet_config(find_parts(shapes)["unet"], shapes, text_width=None, refiner=refiner, size=size)
    assert {key: value for key, value in ours.items() if key in wanted} == wanted
    assert not guessed(ours)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "Stable Diffusion 2.1", "SDXL base"])
def test_published_controlnets_are_known_by_their_shapes(name: str, naming: str) -> None:
    unet = published(name)
    left_out = ("out_channels", "up_block_types", "sample_size", "time_cond_proj_dim")
    wanted = {key: value for key, value in unet.items() if key not in left_out}
    wanted |= {"conditioning_embedding_out_channels": [16, 32, 96, 256], "conditioning_channels": 3}
    state = on_meta(lambda: diffusers.ControlNetModel.from_config(wanted))
    prefix = "control_model." if naming == "original" else ""
    shapes = shapes_of(unet_to_original(state, 2) if naming == "original" else state, prefix)
    [part] = find_parts(shapes).values()
    assert part == Part("ControlNetModel", prefix, naming)
    ours = controlnet_config(part, shapes, text_width=None)
    assert {key: value for key, value in ours.items() if key in wanted} == wanted


TEXT = {
    "CLIP L": (768, 12, 12, 3072, "quick_gelu"),
    "OpenCLIP H": (1024, 23, 16, 4096, "gelu"),
    "OpenCLIP bigG": (1280, 32, 20, 5120, "gelu"),
}


@pytest.mark.parametrize("name", TEXT)
def test_published_text_encoders_are_known_by_their_shapes(name: str) -> None:
    width, layers, heads, inner, act = TEXT[name]
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, projection_dim=width
    )
    cls = transformers.CLIPTextModelWithProjection if "bigG" in name else transformers.CLIPTextModel
    state = on_meta(lambda: cls(config))
    stems = {"CLIP L": "cond_stage_model.transformer.text_model.", "OpenCLIP H": "cond_stage_model.model."}
    prefix = stems.get(name, "conditioner.embedders.1.model.")
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    if name != "CLIP L":
        state = clip_to_open_clip(state, unused_layer="H" in name)
    unet = dict.fromkeys(
        "model.diffusion_model." + key
        for key in ("input_blocks.0.0.weight", "time_embed.0.weight", "output_blocks.0.0.in_layers.0.weight")
    )
    shapes = {**shapes_of(state, prefix), **dict.fromkeys(unet, (1, 1))}
    parts = find_parts(shapes)
    ours = text_config(next(part for key, part in parts.items() if key.startswith("text_encoder")), shapes)
    found = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    assert tuple(ours[key] for key in found) == TEXT[name]
    assert (ours["vocab_size"], ours["max_position_embeddings"], ours["projection_dim"]) == (49408, 77, width)


def test_the_published_autoencoder_is_known_by_its_shapes() -> None:
    wanted = {
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4, "in_channels": 3, "out_channels": 3,
        "norm_num_groups": 32, "use_quant_conv": True, "mid_block_add_attention": True, "sample_size": 512,
        "scaling_factor": 0.18215,
    }  # fmt: skip
    state = on_meta(lambda: diffusers.AutoencoderKL.from_config(wanted))
    for shapes in (shapes_of(state), shapes_of(vae_to_original(state, 4), "first_stage_model.")):
        [part] = find_parts(shapes).values()
        ours = vae_config(part, shapes, scaling_factor=0.18215, size=512)
        assert {key: value for key, value in ours.items() if key in wanted} == wanted


# -- parts ---------------------------------------------------------------------------------------------------------------


@KNOWN
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_controlnet_in_a_single_file(torch_family: Folder, tmp_path: Path, naming: str) -> None:
    folder = torch_family("controlnet")
    net = folder.parent / f"{folder.name}-net0"
    state = weights_of(net)
    if naming == "original":
        state = {
            f"control_model.{n}": t for n, t in unet_to_original(state, config_of(net)["layers_per_block"]).items()
        }
    save_file(state, tmp_path / "net.safetensors")
    checkpoint = Checkpoint(FileSource(tmp_path / "net.safetensors"), options(config=net))
    assert checkpoint.components == {"controlnet": "ControlNetModel"}
    read, wanted = checkpoint.weights("controlnet")(), weights_of(net)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    inferred = Checkpoint(FileSource(tmp_path / "net.safetensors"), options()).config("controlnet")
    said = config_of(net)
    for key in inferred.keys() - {"attention_head_dim", "norm_num_groups"}:
        assert inferred[key] == said[key], key


@KNOWN
def test_parts_of_a_pipeline_from_single_files(
    small: Callable[[str], tuple[Path, Path]], session_cache: Cache, tmp_path: Path
) -> None:
    """A UNet alone, as Lightning's come, and an autoencoder, as sdxl-vae-fp16-fix: in both namings."""
    folder, file = small("sd1")
    whole = load_file(file)
    unet, vae = weights_of(folder / "unet"), weights_of(folder / "vae")
    save_file(unet, tmp_path / "unet.safetensors")
    save_file({n: t for n, t in whole.items() if n.startswith("model.")}, tmp_path / "unet-original.safetensors")
    save_file(vae, tmp_path / "sdxl-vae.safetensors")
    own = {n.removeprefix("first_stage_model."): t for n, t in whole.items() if n.startswith("first_stage_model.")}
    save_file({**own, "loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    for name, component in (("unet", "unet"), ("unet-original", "unet"), ("sdxl-vae", "vae"), ("vae", "vae")):
        source = FileSource(tmp_path / f"{name}.safetensors")
        assert DiffusersLoader(LoaderOptions()).can_load(source) is Match.YES
        with pytest.warns(UserWarning, match="guessed" if component == "unet" else "scaling_factor") as said:
            checkpoint = Checkpoint(source, options())
        assert list(checkpoint.components) == [component]
        assert checkpoint.index == {}
        read = checkpoint.weights(component)()
        wanted = unet if component == "unet" else vae
        assert read.keys() == wanted.keys()
        assert all(torch.equal(read[each], wanted[each]) for each in wanted)
        if component == "vae":
            factor = 0.13025 if "xl" in name else 0.18215
            assert checkpoint.config("vae")["scaling_factor"] == factor
            assert str(factor) in str(said[0].message)
    pipe = ovforge.Pipeline(
        "text-to-image", source=folder, device=F32, cache=session_cache, scheduler=DDIM,
        load={"weights": "f32", "parts": {"unet": str(tmp_path / "unet.safetensors")}},
    )  # fmt: skip
    assert pipe("a cat", steps=2, seed=1, width=16, height=16).images
    assert pipe.bundle.configs["unet"]["cross_attention_dim"] == 32


# -- options -------------------------------------------------------------------------------------------------------------


def test_the_command_converts_a_single_file(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ovforge.cli import app

    folder, file = small("sd1")
    done = CliRunner().invoke(app, ["convert", str(file), "-o", str(tmp_path / "out"), "-s", "weights=f32"])
    assert done.exit_code == 0, done.output
    opened = ModelBundle.open(FileSource(tmp_path / "out"))
    assert set(opened.models) == {"text_encoder", "unet", "vae_encoder", "vae_decoder", "tokenizer", "detokenizer"}
    assert opened.scheduler_config()["_class_name"] == "PNDMScheduler"
    assert opened.configs["unet"]["_class_name"] == "UNet2DConditionModel"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    program = [sys.executable, "-m", "ovforge", "convert", str(alone), "-o", str(tmp_path / "other")]
    refused = subprocess.run(program, capture_output=True, text=True, env=WITHOUT_PACKAGES)
    assert refused.returncode != 0
    assert "no tokenizer" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()
