"""Small models with random weights, one for each family of the true architectures, as diffusers folders."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovforge
from ovforge import Use
from ovforge.model.results import ImagesResult
from ovforge.store.cache import Cache

ROOT = Path(__file__).parents[1]
TRANSFORMERS = {
    "sd3": ("test_transformers", "StableDiffusion3Pipeline"),
    "flux": ("test_transformers", "FluxPipeline"),
    "zimage": ("test_zimage", "ZImagePipeline"),
    "flux2": ("test_flux2", "Flux2KleinPipeline"),
    "sana": ("test_sana", "SanaPipeline"),
    "qwenimage": ("test_qwenimage", "QwenImagePipeline"),
    "pixart": ("test_pixart", "PixArtSigmaPipeline"),
    "lumina2": ("test_lumina2", "Lumina2Pipeline"),
}
"""Family of transformers -> the tests that make its model, diffusers' pipeline."""


def maker(name: str = "conftest") -> Any:
    """Return a test module of the converter's own, which builds diffusers folders."""
    spec = importlib.util.spec_from_file_location(f"small_{name}", ROOT / f"plugins/diffusers/tests/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pipeline(source: Path, cache: Cache, task: str | Use = "text-to-image", **options: Any) -> Any:
    """Return a pipeline of a diffusers folder, all of it in float32."""
    load = {"weights": "f32"}
    return ovforge.Pipeline(task, source=source, load=load, device=Use("cpu", precision="f32"), cache=cache, **options)


def seeded(seeds: list[int]) -> Any:
    """Return torch's generators for pictures of these seeds, as diffusers takes one or several."""
    torch = pytest.importorskip("torch")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def agree(ours: ImagesResult, theirs: list[Any], anywhere: int = 2, average: float = 0.2) -> None:
    """Compare pictures, in steps of 1/255."""
    assert len(ours.images) == len(theirs)
    for mine, wanted in zip(ours.images, theirs, strict=True):
        difference = np.abs(np.asarray(mine, np.int16) - np.asarray(wanted, np.int16))
        assert difference.shape == np.asarray(wanted).shape
        assert difference.max() <= anywhere
        assert difference.mean() <= average


@functools.lru_cache(maxsize=8)
def _read_by_diffusers(source: Path) -> Any:
    index = json.loads((source / "model_index.json").read_text())
    absent = {part: None for part, kind in index.items() if kind == [None, None]}  # which diffusers wants to be told
    return pytest.importorskip("diffusers").DiffusionPipeline.from_pretrained(source, **absent)


def original(kind: str, source: Path, **parts: Any) -> Any:
    """Return diffusers' pipeline of a folder, of class `kind`, with other `parts` if they are given.

    Folders are read once, and all pipelines of one share its modules: whoever changes a module reads it itself.
    """
    shared = _read_by_diffusers(source)
    scheduler = type(shared.scheduler).from_pretrained(source / "scheduler")  # since some pipelines change its config
    pipe = getattr(pytest.importorskip("diffusers"), kind).from_pipe(shared, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def leave_out(source: Path, target: Path, *parts: str) -> Path:
    """Copy a pipeline without some parts, which its index then says to be left out."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*parts))
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, **{part: [None, None] for part in parts}}))
    return target


def said_of_call(pipe: Any, result: Any) -> list[str]:
    """Return the warnings of one call, without what the pipeline says of its stages in every result."""
    return [warning for warning in result.warnings if warning not in pipe.warnings()]


def make_transformer(folder: Path, family: str, torch_lcm: Path) -> Path:
    """Write a pipeline of one of `TRANSFORMERS`."""
    name = TRANSFORMERS[family][0]
    small = maker(name)
    if name == "test_transformers":
        made: Path = small.make_transformer_pipeline(folder, torch_lcm, family)
    else:
        made = getattr(small, f"make_{family}_pipeline")(folder)
    return made


def make_family(folder: Path, family: str, layers: int | None = None) -> Path:
    """Write a pipeline of a family: sd1, sd2, inpaint, xl, refiner, controlnet.

    Each level of sd2, xl and refiner has one layer if `layers` does not say otherwise, which has every kind of block and is
    converted in half the time; those of the others, whose UNets fit the same ControlNets, have two as published.
    """
    layers = layers or (1 if family in ("sd2", "xl", "refiner") else 2)
    torch = pytest.importorskip("torch")
    build = maker()
    four: dict[str, Any] = {  # every block type of Stable Diffusion's UNet, at four levels
        "block_out_channels": (16, 16, 32, 32), "layers_per_block": layers, "norm_num_groups": 8, "time_cond_proj_dim": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "attention_head_dim": 2,
    }  # fmt: skip
    if family in ("sd1", "controlnet"):
        build.make_pipeline(folder, **four)
        build.write_index(folder, _class_name="StableDiffusionPipeline", image_encoder=[None, None])
    elif family == "sd2":
        four |= {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True}
        build.make_pipeline(folder, **four)
        build.write_index(folder, _class_name="StableDiffusionPipeline", image_encoder=[None, None])
    elif family == "inpaint":
        build.make_pipeline(folder, **four, in_channels=9, out_channels=4)
        build.write_index(folder, _class_name="StableDiffusionInpaintPipeline", image_encoder=[None, None])
    else:
        torch.manual_seed(0)
        _make_xl(folder, build, layers, refiner=family == "refiner")
    _scheduler(folder, prediction="v_prediction" if family == "sd2" else "epsilon")
    if family == "controlnet":
        _make_controlnet(folder)
    return folder


def _make_xl(folder: Path, build: Any, layers: int, *, refiner: bool) -> None:
    import transformers

    three: dict[str, Any] = {
        "block_out_channels": (16, 32, 32), "layers_per_block": layers, "norm_num_groups": 8, "time_cond_proj_dim": None,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "attention_head_dim": (2, 4, 4), "use_linear_projection": True,
        "cross_attention_dim": 24 if refiner else 56, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 8 * (5 if refiner else 6),
    }  # fmt: skip
    build.make_pipeline(folder, **three)
    first = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    second = transformers.CLIPTextConfig(
        **{**first.to_dict(), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "hidden_act": "gelu"}
    )
    transformers.CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    names: dict[str, Any] = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "image_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": not refiner,
        "requires_safety_checker": None,
        "safety_checker": None,
    }
    if refiner:
        shutil.rmtree(folder / "text_encoder")
        shutil.rmtree(folder / "tokenizer")
        names |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    build.write_index(folder, **names)
    index = folder / "model_index.json"
    kept = {key: value for key, value in json.loads(index.read_text()).items() if value is not None}
    index.write_text(json.dumps(kept))


def _scheduler(folder: Path, prediction: str) -> None:
    import diffusers

    diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))


def _make_controlnet(folder: Path) -> None:
    import diffusers
    import torch

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    for number in (0, 1):
        torch.manual_seed(number)
        net = diffusers.ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 8, 16, 16), load_weights_from_unet=False
        )
        with torch.no_grad():  # a fresh ControlNet adds nothing: its last convolutions are zero
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.05)
        net.save_pretrained(folder.parent / f"{folder.name}-net{number}")
