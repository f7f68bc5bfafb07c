"""Single-file checkpoints: each family written in the original naming, opened, and compared with its folder."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from families import maker
from ovforge import Use
from ovforge.contracts.stages import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource
from ovforge.plugins.manager import Plugins
from ovforge.run.resolution import find_loader
from ovforge.run.session import Session
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("ovforge_diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from ovforge_diffusers import vocabulary  # noqa: E402
from ovforge_diffusers.checkpoint import Checkpoint  # noqa: E402
from ovforge_diffusers.families import identify  # noqa: E402
from ovforge_diffusers.header import Header, Part, find_parts  # noqa: E402
from ovforge_diffusers.infer import controlnet_config, guessed, text_config, unet_config, vae_config  # noqa: E402
from ovforge_diffusers.loader import HOMES, Conversion, DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402
from ovforge_diffusers.vocabulary import clip_files, packaged_merges  # noqa: E402
from ovforge_diffusers.weights import fill_weights  # noqa: E402

Folder = Callable[[str], Path]
Tensors = dict[str, Any]

vae_to_original = maker("foreign_names").vae_to_original

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
    edit(target / "vae/config.json", scaling_factor=0.13025 if family in ("xl", "refiner") else 0.18215)
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


def checkpoint_file(path: Path) -> FileSource:
    """Return a file as the loader gets it, with the tokenizers beside it."""
    return FileSource(path, beside=("tokenizer*/*",))


def load(source: Path, **changes: Any) -> ModelBundle:
    return DiffusersLoader(options(**changes)).load(checkpoint_file(source))


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
    checkpoint, index = (
        Checkpoint(checkpoint_file(file), options()),
        json.loads((folder / "model_index.json").read_text()),
    )
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
    "inpaint": ("inpainting", {"image": "noise", "mask": "hole"}),
    "xl": ("text-to-image", {"width": 16, "height": 24}),
    "refiner": ("image-to-image", {"image": "noise", "strength": 0.6}),
}


def shrink(folder: Path) -> None:
    """Replace a UNet by one of two levels, which converts in a second."""
    config = config_of(folder / "unet")
    for key in ("block_out_channels", "down_block_types", "attention_head_dim", "transformer_layers_per_block"):
        config[key] = config[key][:2] if isinstance(config[key], list) else config[key]
    ups = ["CrossAttnUpBlock2D" if "Attn" in kind else "UpBlock2D" for kind in reversed(config["down_block_types"])]
    config |= {"up_block_types": ups, "layers_per_block": 1}
    shutil.rmtree(folder / "unet")
    torch.manual_seed(1)
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


@pytest.fixture(scope="module")
def shallow(torch_family: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that gives a family's folder with a UNet of two levels, and its single file, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            place = tmp_path_factory.mktemp(f"shallow-{family}")
            folder = by_rule(torch_family(family), place / "folder", family)
            shrink(folder)
            save_file(original(folder, family), place / "model.safetensors")
            shutil.copytree(folder / ("tokenizer_2" if family == "refiner" else "tokenizer"), place / "tokenizer")
            made[family] = folder, place / "model.safetensors"
        return made[family]

    return get


@pytest.mark.sweep
@KNOWN
@pytest.mark.parametrize("family", PICTURES)
def test_pictures_of_a_single_file_are_those_of_the_folder(
    shallow: Callable[[str], tuple[Path, Path]], session_cache: Cache, family: str
) -> None:
    task, inputs = PICTURES[family]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    mask = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
    inputs = {name: {"noise": noise, "hole": mask}.get(str(value), value) for name, value in inputs.items()}
    pictures = []
    for source in reversed(shallow(family)):
        full = {"weights": "f32"}
        pipe = ovforge.Pipeline(task, source=source, load=full, device=F32, cache=session_cache, scheduler=DDIM)
        pictures.append(np.asarray(pipe("a pink unicorn", steps=3, seed=5, **inputs).images[0]))
    assert pictures[0].std() > 5
    # Weights of a file and of a folder lie in memory at other places, which may round sums otherwise.
    first, second = (picture.astype(int) for picture in pictures)
    assert np.abs(first - second).max() <= 1 and (first != second).mean() < 0.01


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
    width, layers, _, inner, _ = TEXT[name]
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
    checkpoint = Checkpoint(checkpoint_file(tmp_path / "net.safetensors"), options(config=net))
    assert checkpoint.components == {"controlnet": "ControlNetModel"}
    read, wanted = checkpoint.weights("controlnet")(), weights_of(net)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    inferred = Checkpoint(checkpoint_file(tmp_path / "net.safetensors"), options()).config("controlnet")
    said = config_of(net)
    for key in inferred.keys() - {"attention_head_dim", "norm_num_groups"}:
        assert inferred[key] == said[key], key


@KNOWN
def test_parts_of_a_pipeline_from_single_files(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
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


@KNOWN
def test_a_part_of_a_pipeline_from_a_single_file(torch_lcm: Path, cache: Cache, tmp_path: Path) -> None:
    """Also a ready pipeline with another UNet, as Lightning's come: weights in diffusers' naming, and no config."""
    config = {**config_of(torch_lcm / "unet"), "norm_num_groups": 16}
    torch.manual_seed(3)
    save_file(diffusers.UNet2DConditionModel.from_config(config).state_dict(), tmp_path / "unet.safetensors")
    load = {"weights": "f32", "parts": {"unet": str(tmp_path / "unet.safetensors")}}
    lcm = Use("diffusers", class_name="LCMScheduler")
    pipe = ovforge.Pipeline("text-to-image", source=torch_lcm, load=load, device=F32, cache=cache, scheduler=lcm)
    assert pipe("a cat", steps=2, seed=1, width=16, height=16).images
    assert pipe.bundle.configs["unet"]["time_cond_proj_dim"] == 24
    assert pipe.bundle.configs["unet"]["norm_num_groups"] == 16


# -- options and what the file says -------------------------------------------------------------------------------------


@KNOWN
def test_the_command_converts_a_single_file(
    torch_lcm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = by_rule(torch_lcm, tmp_path / "folder", "lcm")
    file = tmp_path / "model.safetensors"
    save_file(original(folder, "lcm"), file)

    def ovforge_convert(*arguments: object) -> int:
        from ovforge.cli import main

        monkeypatch.setattr(sys, "argv", ["ovforge", "convert", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    monkeypatch.setattr(vocabulary, "PACKAGES", ())
    assert ovforge_convert(file, "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "a checkpoint has no tokenizer" in said
    assert "tokenizer = FOLDER" in said
    assert not (tmp_path / "out").exists()
    # A whole diffusers folder is as good as its tokenizer.
    assert ovforge_convert(file, "-o", tmp_path / "out", "-s", f"tokenizer={folder}", "-s", "weights=f32") == 0
    opened = ModelBundle.open(FileSource(tmp_path / "out"))
    assert set(opened.models) == {"text_encoder", "unet", "vae_encoder", "vae_decoder", "tokenizer", "detokenizer"}
    assert opened.scheduler_config()["_class_name"] == "LCMScheduler"
    theirs = DiffusersLoader(options()).load(FileSource(folder))
    theirs.save(tmp_path / "theirs")
    for role in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        for suffix in ("xml", "bin"):
            mine, wanted = (tmp_path / name / role / f"openvino_model.{suffix}" for name in ("out", "theirs"))
            assert mine.read_bytes() == wanted.read_bytes()


@KNOWN
def test_averaged_weights(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, file = small("sd1")
    tensors, averaged = load_file(file), {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            averaged["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor + 1
    both = tmp_path / "both.safetensors"
    save_file({**tensors, **averaged, "model_ema.decay": torch.zeros(()), "betas": torch.zeros(1000)}, both)
    shutil.copytree(file.parent / "tokenizer", tmp_path / "tokenizer")
    plain, ema = (Checkpoint(checkpoint_file(both), options(ema=ema)).weights("unet")() for ema in (False, True))
    assert plain.keys() == ema.keys()
    assert all(torch.equal(plain[name] + 1, ema[name]) for name in plain)
    with pytest.raises(ModelError, match="no averaged weights"):
        Checkpoint(checkpoint_file(file), options(ema=True))


@KNOWN
def test_what_the_unet_predicts(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """By metadata, by marks in the file, by the steps of training, by the option; a guess is said."""

    def prediction(family: str, metadata: dict[str, str] | None = None, **changes: Any) -> tuple[str, str, bool]:
        tensors = load_file(small(family)[1])
        extra = changes.pop("extra", {})
        save_file({**tensors, **extra}, tmp_path / "model.safetensors", metadata=metadata)
        changes = {"tokenizer": small(family)[1].parent / "tokenizer", **changes}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            checkpoint = Checkpoint(checkpoint_file(tmp_path / "model.safetensors"), options(**changes))
        config = json.loads(checkpoint.assets("scheduler")["scheduler/scheduler_config.json"])
        guess = any("does not say what its UNet predicts" in str(each.message) for each in said)
        return config["prediction_type"], config["timestep_spacing"], guess

    assert prediction("sd1") == ("epsilon", "leading", False)
    assert prediction("sd2") == ("v_prediction", "leading", True)
    assert prediction("sd2", prediction_type="epsilon") == ("epsilon", "leading", False)
    assert prediction("sd2", {"modelspec.prediction_type": "epsilon"}) == ("epsilon", "leading", False)
    assert prediction("sd2", {"modelspec.prediction_type": "v"}) == ("v_prediction", "leading", False)
    assert prediction("sd2", extra={"global_step": torch.tensor(875000)}) == ("epsilon", "leading", False)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    assert prediction("xl", extra=marks) == ("v_prediction", "trailing", False)
    given = {"config": small("xl")[0], "prediction_type": "v_prediction"}
    assert prediction("xl", **given) == ("v_prediction", "leading", False)
    folder = {"config": small("xl")[0]}
    assert prediction("xl", extra=marks, **folder) == ("v_prediction", "trailing", False), "the file's marks count"
    assert prediction("xl", {"modelspec.prediction_type": "v"}, **folder)[0] == "v_prediction"
    assert prediction("xl", **folder) == ("epsilon", "leading", False)


@pytest.mark.sweep
@KNOWN
@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_a_checkpoint_without_text_encoders(
    shallow: Callable[[str], tuple[Path, Path]], tmp_path: Path, session_cache: Cache, family: str
) -> None:
    """It says how to bring them, and they come with their tokenizers."""
    folder, file = shallow(family)
    stems = ("cond_stage_model.", "conditioner.")
    save_file({n: t for n, t in load_file(file).items() if not n.startswith(stems)}, tmp_path / "model.safetensors")
    full = {"weights": "f32"} | ({"config": str(folder)} if family == "xl" else {})
    call: dict[str, Any] = {"steps": 2, "width": 16, "height": 16, "seed": 1}
    with pytest.raises(ModelError, match="no text encoder") as failed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ovforge.Pipeline(
            "text-to-image", source=tmp_path / "model.safetensors", load=full, device=F32, cache=session_cache
        )
    assert "[load.parts]" in failed.value.hint
    roles = ["text_encoder", "tokenizer"] + ["text_encoder_2", "tokenizer_2"] * (family == "xl")
    brings = load(folder)  # converted in float32, as the checkpoint is
    for role in set(brings.models) - set(roles):
        del brings.models[role]
    brings.save(tmp_path / "brings")
    parts = dict.fromkeys(roles, str(tmp_path / "brings"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = ovforge.Pipeline(
            "text-to-image", source=tmp_path / "model.safetensors", load={**full, "parts": parts}, device=F32,
            cache=session_cache,
        )("a pink cat", **call)  # fmt: skip
        wanted = ovforge.Pipeline("text-to-image", source=file, load={**full}, device=F32, cache=session_cache)(
            "a pink cat", **call
        )
    np.testing.assert_allclose(ours.latents, wanted.latents, atol=2e-3)


@KNOWN
def test_a_config_folder_decides(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Its heads, its tokenizer and its noise schedule; not its weights, which may be missing."""
    folder, file = small("xl")
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    edit(configs / "unet/config.json", attention_head_dim=[4, 8, 8])
    edit(configs / "scheduler/scheduler_config.json", beta_end=0.5)
    alone = tmp_path / "model.safetensors"
    shutil.copy(file, alone)
    checkpoint = Checkpoint(checkpoint_file(alone), options(config=configs))
    assert checkpoint.config("unet")["attention_head_dim"] == [4, 8, 8]
    assert json.loads(checkpoint.assets("scheduler")["scheduler/scheduler_config.json"])["beta_end"] == 0.5
    assert checkpoint.assets("tokenizer_2")["tokenizer_2/vocab.json"]
    assert checkpoint.index == {
        k: v for k, v in json.loads((folder / "model_index.json").read_text()).items() if k[:5] != "_name"
    }
    with pytest.raises(ModelError, match="has no text_encoder"):
        Checkpoint(checkpoint_file(alone), options(config=configs / "unet"))
    with pytest.raises(ConfigError, match=r"load\.config.*single-file"):
        load(folder, config=configs)


def test_a_tokenizer_of_another_model_is_refused(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, file = small("sd1")
    for name, data in clip_files(["a b", "c d</w>"]).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=r"knows 516 words, and the text encoder \d+"):
        Checkpoint(checkpoint_file(file), options(tokenizer=tmp_path))
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Checkpoint(checkpoint_file(file), options(tokenizer=tmp_path))


@KNOWN
def test_the_padding_of_the_family_is_taken(small: Callable[[str], tuple[Path, Path]]) -> None:
    _, file = small("sd2")
    with pytest.warns(UserWarning, match="fills up with '<|endoftext|>', this family with '!'"):
        checkpoint = Checkpoint(checkpoint_file(file), options(tokenizer=small("sd1")[0]))
    assert checkpoint.optional("tokenizer", "tokenizer_config.json")["pad_token"] == "!"


def test_a_vocabulary_from_its_merges(tmp_path: Path) -> None:
    """By CLIP's scheme, read by transformers; small here, OpenAI's own where a package brings it."""
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    tokens = clip_tokenizer(clip_files(merges), tmp_path / "small")
    assert tokens("cat dog")["input_ids"] == [516, 513, 515, 517]
    vocabulary_ = tokens.get_vocab()
    assert [vocabulary_[word] for word in ("!", "~", "ÿ", "Ā", "!</w>", "ca", "<|startoftext|>")] == [
        0,
        93,
        187,
        188,
        256,
        512,
        516,
    ]


PROMPTS = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a photo of a dog": [49406, 320, 1125, 539, 320, 1929, 49407],
    "Hello, World!": [49406, 3306, 267, 1002, 256, 49407],
}
"""Ids that OpenAI's CLIP gives, as its published examples show."""


def test_openais_vocabulary_from_a_package(tmp_path: Path) -> None:
    merges = packaged_merges()
    if not merges:
        pytest.skip("needs a package that brings CLIP's merges (open_clip_torch)")
    files = clip_files(merges)
    tokens = clip_tokenizer(files, tmp_path / "clip")
    assert len(tokens) == 49408
    for prompt, ids in PROMPTS.items():
        assert tokens(prompt)["input_ids"] == ids
    assert json.loads(files["vocab.json"]).keys() == tokens.get_vocab().keys()
    assert original_tokenizer_agrees(files, tokens)


def clip_tokenizer(files: dict[str, bytes], folder: Path) -> Any:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def original_tokenizer_agrees(files: dict[str, bytes], tokens: Any) -> bool:
    """Compare with OpenAI's own SimpleTokenizer, run from the package that brings the merges: words and random texts."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or importlib.util.find_spec("ftfy") is None:
        return True
    path = Path((spec.submodule_search_locations or [""])[0]) / "tokenizer.py"
    loader = importlib.util.spec_from_file_location("open_clips_tokenizer", path)
    assert loader and loader.loader
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    theirs = module.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary_ = {names.get(word, word): number for word, number in theirs.encoder.items()}
    assert vocabulary_ == json.loads(files["vocab.json"])
    words = sorted(word[:-4] for word in vocabulary_ if word.endswith("</w>") and word[:-4].isascii())
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = " ".join(rng.choice(words, rng.integers(1, 40)))
        assert tokens(text)["input_ids"] == [49406, *theirs.encode(text), 49407], text
    return True


# -- files that are something else, or damaged -----------------------------------------------------------------------------


OTHERS: dict[str, Tensors] = {
    "a LoRA of kohya's": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)},
    "a LoRA of diffusers'": {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(4, 4)},
    "a LoRA without a prefix": {"conv_in.lora_A.weight": torch.zeros(4, 4), "conv_in.weight": torch.zeros(4, 4)},
    "an embedding": {"emb_params": torch.zeros(2, 768)},
    "an embedding of SDXL": {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
    "a text encoder": {"text_model.embeddings.token_embedding.weight": torch.zeros(8, 4)},
    "a model of another kind": {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": torch.zeros(4, 4)},
    "a half of an autoencoder of FLUX.1": {
        "encoder.down.0.block.0.conv1.weight": torch.zeros(4, 4, 3, 3), "decoder.conv_in.weight": torch.zeros(4, 16, 3, 3),
    },
    "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_never_claimed(tmp_path: Path, what: str) -> None:
    save_file(OTHERS[what], tmp_path / "file.safetensors")
    source = FileSource(tmp_path / "file.safetensors")
    assert DiffusersLoader(LoaderOptions()).can_load(source) is Match.NO
    with pytest.raises(ModelError, match="holds no UNet, autoencoder or ControlNet"):
        load(tmp_path / "file.safetensors")


def headed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


FIRST = {name: {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(
    ("encoder.down.0.block.0.conv1.weight", "encoder.conv_in.weight", "decoder.conv_out.weight")
)} | {"decoder.conv_in.weight": {"dtype": "F32", "shape": [1, 4, 1, 1], "data_offsets": [12, 28]}}  # fmt: skip
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"this is not a model at all", "not a safetensors file"),
    "a header longer than the file": (headed({}, length=2**62), "not a safetensors file"),
    "a huge header": (headed(b"{" + b" " * (17 * 2**20)), "more than"),
    "no JSON": (headed(b"{" * 64), "header cannot be read|not valid JSON|expected a JSON object"),
    "deep JSON": (headed(b"[" * 100_000), "header cannot be read|not valid JSON|expected a JSON object"),
    "a list": (headed([1, 2, 3]), "header cannot be read|not valid JSON|expected a JSON object"),
    "a shape of words": (headed({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}), "header cannot be read|not valid JSON|expected a JSON object"),
    "a negative shape": (headed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "header cannot be read|not valid JSON|expected a JSON object"),
    "a cut file": (headed(FIRST, b"\0" * 20), "cannot be read"),
    "offsets outside": (
        headed(FIRST | {"quant_conv.weight": {"dtype": "F32", "shape": [2**20] * 3, "data_offsets": [28, 2**62]}}, b"\0" * 28),
        "cannot be read",
    ),
    "tensors over each other": (
        headed(FIRST | {"quant_conv.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 28),
        "cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(tmp_path: Path, what: str) -> None:
    data, message = HOSTILE[what]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    loader = DiffusersLoader(LoaderOptions())
    tracemalloc.start()
    try:
        assert loader.can_load(FileSource(file)) is not Match.NO
        with pytest.raises(ModelError, match=message) as caught:
            loader.load(checkpoint_file(file))
        assert str(file) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


@KNOWN
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.diffusion_model.input_blocks.1.0.in_layers.2.bias",
            lambda t: t * float("nan"),
            "holds NaN or infinity",
        ),
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.bias", None, "conv1.bias is missing"),
        ("model.diffusion_model.stranger.weight", lambda _: torch.ones(3), "stranger.weight belong nowhere"),
        ("model.diffusion_model.out.2.bias", lambda _: torch.ones(9), r"conv_out.bias is \[9\], not \[4\]"),
        ("model.diffusion_model.out.2.bias", lambda t: t.to(torch.int8), "not a float type"),
    ],
)
def test_damaged_weights_are_said(
    torch_lcm: Path, tmp_path: Path, name: str, change: Callable[[Any], Any] | None, message: str
) -> None:
    folder = by_rule(torch_lcm, tmp_path / "folder", "lcm")
    tensors = original(folder, "lcm")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    save_file(tensors, tmp_path / "model.safetensors")
    bundle = load(tmp_path / "model.safetensors", tokenizer=folder)
    with pytest.raises(ModelError, match=message) as caught:
        _ = bundle.models["unet"]
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_no_shapes_whatever_end_in_anything_but_an_error_in_words(
    small: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Tensors cut out, flattened, turned, emptied, renamed, at random: it opens and gives weights, or says why not."""
    rng = np.random.default_rng(0)
    changes: list[Callable[[Any], Any]] = [
        lambda t: t.flatten(), lambda t: t.T if t.ndim == 2 else t, lambda t: t[:0], lambda t: torch.zeros(()),
        lambda t: t[None], lambda t: t[: max(1, len(t) // 2)] if t.ndim else t,
    ]  # fmt: skip
    refused = 0
    for turn in range(42):
        family = FAMILIES[turn % len(FAMILIES)]
        _, file = small(family)
        tensors = load_file(file)
        telling = [
            n for n in tensors if re.search(r"blocks\.(0|1|2)\.|down\.\d|embed|conv_|middle|layers\.0|label|proj", n)
        ]
        for name in rng.choice(telling, rng.integers(1, 4)):
            change = int(rng.integers(len(changes) + 2))
            if change == len(changes):
                tensors.pop(name, None)
            elif change > len(changes):
                tensors[f"{name}.{rng.integers(10**6)}"] = tensors.get(name, torch.zeros(1))
                tensors.pop(name, None)
            elif name in tensors:
                tensors[name] = changes[change](tensors[name])
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        given = options(tokenizer=file.parent / "tokenizer")
        try:
            checkpoint = Checkpoint(checkpoint_file(tmp_path / "model.safetensors"), given)
            for component, kind in checkpoint.components.items():
                if kind in HOMES:
                    module = Conversion(checkpoint, given).module(component, kind)
                    weights = checkpoint.weights(component)()
                    fill_weights(module, weights, checkpoint.where(component), checkpoint.misfit)
        except ModelError:
            refused += 1
    assert refused > 20


@KNOWN
def test_what_belongs_to_no_submodel_is_said(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, file = small("sd1")
    shutil.copytree(file.parent / "tokenizer", tmp_path / "tokenizer")
    noise = {"alphas_cumprod": torch.zeros(9), "cond_stage_model.logit_scale": torch.zeros(())}
    save_file({**load_file(file), **noise}, tmp_path / "model.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Checkpoint(checkpoint_file(tmp_path / "model.safetensors"), options())
    assert not [each for each in said if "no submodel" in str(each.message)]
    save_file({**load_file(file), "aesthetics.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="1 tensors belong to no submodel and are left out: aesthetics.weight"):
        Checkpoint(checkpoint_file(tmp_path / "model.safetensors"), options())
    save_file({**load_file(file), "edm_mean": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="Playground"):
        Checkpoint(checkpoint_file(tmp_path / "model.safetensors"), options())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"load\.tokenizer.*holds no vocab\.json"):
        Checkpoint(checkpoint_file(file), options(tokenizer=tmp_path / "empty"))


def test_irregular_blocks_and_pickles_are_said(small: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, file = small("sd1")
    tensors = {n: t for n, t in load_file(file).items() if ".input_blocks.1.1.transformer_blocks" not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"differ within a level") as caught:
        load(tmp_path / "model.safetensors")
    assert "config = FOLDER" in str(caught.value)
    for suffix in ("ckpt", "pth"):
        (tmp_path / f"model.{suffix}").write_bytes(b"\x80\x02junk")
        offer = find_loader(FileSource(tmp_path / f"model.{suffix}"), None, Session(Plugins()))
        assert offer.extension.name == "diffusers"
        with pytest.raises(ModelError, match="is a pickle"):
            load(tmp_path / f"model.{suffix}")


@KNOWN
def test_half_precision_and_one_submodel_at_a_time(
    torch_lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the text encoder reads nothing of the UNet; no tensor is copied to another type."""
    folder = by_rule(torch_lcm, tmp_path / "folder", "lcm")
    kinds = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    tensors = {name: tensor.to(kinds[n % 3]) for n, (name, tensor) in enumerate(original(folder, "lcm").items())}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(checkpoint_file(tmp_path / "model.safetensors"), options(tokenizer=folder))
    seen: list[str] = []
    import ovforge_diffusers.weights as module

    check = module._check_finite
    monkeypatch.setattr(
        module, "_check_finite", lambda tensor, name, *rest: (seen.append(name), check(tensor, name, *rest))
    )
    for component in ("text_encoder", "vae", "unet"):
        seen.clear()
        weights = checkpoint.weights(component)()
        assert len({name.split(".")[0] for name in seen}) == 1
        assert {tensor.dtype for tensor in weights.values()} <= set(kinds)
    for name, stored in (
        ("conv_out.weight", "out.2.weight"),
        ("conv_out.bias", "out.2.bias"),
        ("conv_in.bias", "input_blocks.0.0.bias"),
    ):
        assert torch.equal(weights[name].float(), tensors[f"model.diffusion_model.{stored}"].float())
