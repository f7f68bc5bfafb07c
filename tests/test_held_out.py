"""Configurations of diffusers' own pipeline tests, which no model here was built for, against diffusers in float32.

Few channels, groups of one, an autoencoder of one level, text encoders whose end token has the number 2, conditions of
kinds that no published model has: the numbers are those of the configs in its tests/pipelines.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from families import agree, maker, pipeline, said_of_call, seeded
from ovforge.errors import InputError, ModelError
from ovforge.model.sources import FileSource
from ovforge.store.cache import Cache
from ovforge_diffusers.loader import DiffusersLoader
from ovforge_diffusers.options import LoaderOptions

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT = "a painting of a squirrel eating a burger"
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET: dict[str, Any] = {
    "block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 32, "norm_num_groups": 2, "cross_attention_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
XL: dict[str, Any] = {
    **UNET, "block_out_channels": (2, 4), "layers_per_block": 2, "norm_num_groups": 1, "cross_attention_dim": 64,
    "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
}  # fmt: skip
FLAT: dict[str, Any] = {
    "block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 1, "use_quant_conv": False, "sample_size": 32,
    "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035,
}  # fmt: skip
STATISTICS: dict[str, Any] = {
    "latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.1, 0.9, 0.8, 1.3], "shift_factor": 0.3,
}  # fmt: skip


def noised(module: Any) -> Any:
    """Fill weights that a fresh module has all alike, zero or one, with random ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module


def clip(kind: str = "CLIPTextModel", width: int = 32, layers: int = 5, **more: Any) -> Any:
    """Return a text encoder whose pooled state, for an end token of 2, is that of the token with the greatest number."""
    config = transformers.CLIPTextConfig(
        bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_size=width, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=layers, vocab_size=1000, projection_dim=32, **more,
    )  # fmt: skip
    return noised(getattr(transformers, kind)(config))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, relative_attention_num_buckets=8,
        feed_forward_proj="relu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


@pytest.fixture(scope="module")
def tokenizers(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return tokenizers by what they are for."""
    target = tmp_path_factory.mktemp("t5")
    maker("test_transformers").write_t5_tokenizer(target)
    return {
        "clip": transformers.CLIPTokenizer.from_pretrained(torch_lcm / "tokenizer"),
        "t5": transformers.T5Tokenizer.from_pretrained(target),
    }


@pytest.fixture(scope="module")
def built(tokenizers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a pipeline of a family, with changes of its denoiser and autoencoder."""

    def build(kind: str, scheduler: Any = None, vae: dict[str, Any] | None = None, **denoiser: Any) -> Path:
        torch.manual_seed(0)
        first = tokenizers["clip"]
        if kind.startswith("Flux"):
            config = {
                "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
            }  # fmt: skip
            parts = {
                "transformer": noised(diffusers.FluxTransformer2DModel(**{**config, **denoiser})),
                "text_encoder": clip(hidden_act="gelu"), "text_encoder_2": t5(), "tokenizer": first,
                "tokenizer_2": tokenizers["t5"], "scheduler": scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
                "vae": noised(diffusers.AutoencoderKL(**{**FLAT, "latent_channels": 1, **(vae or {})})),
            }  # fmt: skip
        else:
            large = "XL" in kind
            parts = {
                "unet": noised(diffusers.UNet2DConditionModel(**{**(XL if large else UNET), **denoiser})),
                "scheduler": scheduler or diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
                "vae": noised(diffusers.AutoencoderKL(**{**VAE, **(vae or {})})),
                "text_encoder": clip(hidden_act="gelu") if large else clip(width=8, layers=2), "tokenizer": first,
            }  # fmt: skip
            second = {"text_encoder_2": clip("CLIPTextModelWithProjection", hidden_act="gelu"), "tokenizer_2": first}
            parts |= second if large else {"safety_checker": None, "feature_extractor": None}
        target = tmp_path_factory.mktemp("held-out") / "pipeline"
        getattr(diffusers, kind)(**parts).save_pretrained(target)
        return target

    return build


def reference(kind: str, source: Path, *, seeds: list[int], **call: Any) -> list[Image.Image]:
    pipe = getattr(diffusers, kind).from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = pipe(prompt=PROMPT, **call, generator=seeded(seeds)).images
    return made


def picture(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def hole(width: int, height: int) -> Image.Image:
    """Return a mask with soft edges, not in the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 + 1 : height // 2 + 3, width // 4 + 1 : width // 2] = 255
    return Image.fromarray(mask).filter(ImageFilter.GaussianBlur(2))


UNETS: dict[str, dict[str, Any]] = {
    "shift": {"resnet_time_scale_shift": "scale_shift", "sample_size": (16, 24)},
    "other": {
        "time_embedding_type": "fourier", "conv_in_kernel": 5, "conv_out_kernel": 5, "center_input_sample": True,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "act_fn": "gelu", "time_embedding_act_fn": "silu",
        "resnet_skip_time_act": True, "attention_head_dim": 2,
    },
    "one": {
        "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "flip_sin_to_cos": False, "freq_shift": 1, "transformer_layers_per_block": 3, "upcast_attention": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_unets(built: Callable[..., Path], session_cache: Cache, name: str) -> None:
    """At the size that the config says, which need not be square, and with the autoencoder's statistics left alone."""
    source = built("StableDiffusionPipeline", vae=STATISTICS if name == "one" else None, **UNETS[name])
    wanted = reference("StableDiffusionPipeline", source, num_inference_steps=2, guidance_scale=6.0, seeds=[3])
    pipe = pipeline(source, session_cache)
    made = pipe(PROMPT, steps=2, guidance_scale=6.0, seed=3)
    agree(made, wanted)
    said = [warning for warning in made.warnings if "count" in warning]
    assert len(said) == (2 if name == "one" else 0), "what of the autoencoder's config does not count is said"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dual_cross_attention": True}, "dual_cross_attention cannot be converted"),
        (
            {
                "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            },
            "of this config cannot be converted: Sizes of tensors must match",
        ),
    ],
)
def test_unets_that_cannot_be(
    built: Callable[..., Path], session_cache: Cache, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        pipeline(built("StableDiffusionPipeline", **changes), session_cache)


def test_guidance_built_in_under_another_pipeline(built: Callable[..., Path], session_cache: Cache) -> None:
    """Steps are spread over a part of the schedule by the pipeline of latent consistency models, and by no other."""
    kinds = "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelImg2ImgPipeline"
    source = built(kinds[0], diffusers.LCMScheduler(**BETAS), time_cond_proj_dim=256)
    index = json.loads((source / "model_index.json").read_text())
    for kind in kinds:
        (source / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        pipe = pipeline(source, session_cache, "image-to-image")
        for steps, strength in ((2, 0.75), (4, 0.6)):
            call: dict[str, Any] = {"image": picture(32, 48), "strength": strength, "guidance_scale": 6.0}
            wanted = reference(kind, source, num_inference_steps=steps, seeds=[5], **call)
            agree(pipe(PROMPT, steps=steps, seed=5, **call), wanted)


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_statistics_of_latents(built: Callable[..., Path], session_cache: Cache, task: str) -> None:
    """Each pipeline of Stable Diffusion XL looks at another part of them, and of sizes for the half to avoid."""
    kind = f"StableDiffusionXL{ {'text-to-image': '', 'image-to-image': 'Img2Img', 'inpainting': 'Inpaint'}[task] }Pipeline"
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    source = built("StableDiffusionXLPipeline", scheduler, {**STATISTICS, "latents_mean": [1.0, -2.0, 0.5, 3.0]})
    call: dict[str, Any] = {"guidance_scale": 5.0, "prompt_2": "different", "negative_prompt": "x"}
    call |= {"negative_original_size": (512, 256), "negative_target_size": (1024, 512)}
    theirs: dict[str, Any] = {}
    mine: dict[str, Any] = {}
    if task == "text-to-image":
        call |= {"width": 72, "height": 40, "original_size": (20, 30)}
        theirs, mine = {"negative_crops_coords_top_left": (3, 4)}, {"negative_crop": (3, 4)}
    else:
        call |= {"image": picture(72, 40), "strength": 0.6}
    if task == "inpainting":
        theirs, mine = {"mask_image": hole(72, 40), "width": 72, "height": 40}, {"mask": hole(72, 40)}
    wanted = reference(kind, source, num_inference_steps=5, seeds=[5], **call, **theirs)
    pipe = pipeline(source, session_cache, task)
    agree(pipe(PROMPT, steps=5, seed=5, **call, **mine), wanted)
    if task == "text-to-image":
        with pytest.raises(InputError, match="only if both are given"):
            pipe(PROMPT, **{**call, "negative_target_size": None})


CROPS = [(4, (90, 50), (64, 64)), (0, (90, 50), (64, 40)), (12, (41, 77), (40, 64)), (300, (41, 77), (48, 48))]


@pytest.fixture(scope="module")
def painting(built: Callable[..., Path]) -> dict[str, Path]:
    """Return models that paint in a picture, by their pipelines."""
    nine = {"in_channels": 9, "out_channels": 4, "cross_attention_dim": 8}
    return {
        "StableDiffusionInpaintPipeline": built("StableDiffusionInpaintPipeline", **nine),
        "FluxInpaintPipeline": built("FluxPipeline"),
    }


@pytest.mark.sweep
@pytest.mark.parametrize(("padding", "size", "made"), CROPS)
@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "FluxInpaintPipeline"])
def test_a_part_of_a_picture(
    painting: dict[str, Path],
    session_cache: Cache,
    kind: str,
    padding: int,
    size: tuple[int, int],
    made: tuple[int, int],
) -> None:
    """Whose sides fit, do not fit, and are wanted larger than the picture is."""
    call: dict[str, Any] = {"image": picture(*size), "padding_mask_crop": padding, "width": made[0], "height": made[1]}
    call |= {"guidance_scale": 4.0, "strength": 0.8}
    length = {"max_sequence_length": 48} if kind.startswith("Flux") else {}
    wanted = reference(kind, painting[kind], mask_image=hole(*size), num_inference_steps=3, seeds=[5], **call, **length)
    pipe = pipeline(painting[kind], session_cache, "inpainting")
    agree(pipe(PROMPT, mask=hole(*size), steps=3, seed=5, **call, **length), wanted)


def test_parts_that_cannot_be(painting: dict[str, Path], session_cache: Cache) -> None:
    call: dict[str, Any] = {"image": picture(40, 24), "steps": 1, "padding_mask_crop": 4}
    with pytest.raises(InputError, match="mask: is black everywhere"):
        pipe = pipeline(painting["StableDiffusionInpaintPipeline"], session_cache, "inpainting")
        pipe(PROMPT, mask=Image.new("L", (40, 24)), **call)
    with pytest.raises(InputError, match="instruction: is for models that are told something"):
        pipe(PROMPT, mask=hole(40, 24), instruction="", **call)


@pytest.mark.parametrize("kind", ["CLIPImageProcessorPil", "CLIPImageProcessorFast", "CLIPFeatureExtractor"])
def test_what_prepares_pictures_is_small_files(painting: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """transformers 5 without torchvision names the first of these classes."""
    source = Path(shutil.copytree(painting["StableDiffusionInpaintPipeline"], tmp_path / "model"))
    (source / "feature_extractor").mkdir()
    (source / "feature_extractor/preprocessor_config.json").write_text("{}")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "feature_extractor": ["transformers", kind]}))
    bundle = DiffusersLoader(LoaderOptions()).load(FileSource(source))
    assert "feature_extractor/preprocessor_config.json" in bundle.assets


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("inpainting", "StableDiffusionInpaintPipeline"),
        ("inpainting", "FluxInpaintPipeline"),
        ("image-to-image", "FluxImg2ImgPipeline"),
    ],
)
def test_a_picture_of_a_batch_is_what_its_seed_gives_alone(
    painting: dict[str, Path], session_cache: Cache, task: str, kind: str
) -> None:
    """In a batch, diffusers draws the latents of the picture to start from once, with the first generator."""
    call: dict[str, Any] = {"image": picture(32, 24), "width": 32, "height": 24, "guidance_scale": 4.0, "strength": 0.8}
    source = painting.get(kind, painting["FluxInpaintPipeline"])
    theirs, mine = ({"mask_image": hole(32, 24)}, {"mask": hole(32, 24)}) if task == "inpainting" else ({}, {})
    wanted = [reference(kind, source, num_inference_steps=3, seeds=[seed], **call, **theirs)[0] for seed in (5, 6)]
    agree(pipeline(source, session_cache, task)(PROMPT, steps=3, seed=5, count=2, **call, **mine), wanted)


@pytest.mark.parametrize(
    ("layers", "call"),
    [
        ((1, 1), {"width": 57, "height": 72, "prompt_2": "a different prompt"}),
        ((1, 1), {"width": 8, "height": 8, "negative_prompt": "bad quality", "true_cfg_scale": 2.0}),
        ((0, 2), {"width": 16, "height": 24, "num_images_per_prompt": 2}),
    ],
)
def test_flux_of_one_latent_channel(
    built: Callable[..., Path],
    painting: dict[str, Path],
    session_cache: Cache,
    layers: tuple[int, int],
    call: dict[str, Any],
) -> None:
    """An autoencoder of one level, whose latents are as many as pixels; and a transformer of one stream."""
    double, single = layers
    source = (
        painting["FluxInpaintPipeline"] if double else built("FluxPipeline", num_layers=0, num_single_layers=single)
    )
    count = call.get("num_images_per_prompt", 1)
    seeds = [3, 4][:count]
    more = {"max_sequence_length": 48}
    wanted = reference("FluxPipeline", source, num_inference_steps=2, seeds=seeds, **call, **more)
    given = {name: value for name, value in call.items() if name != "num_images_per_prompt"}
    pipe = pipeline(source, session_cache)
    made = pipe(PROMPT, steps=2, seed=seeds if count > 1 else 3, count=count, **given, **more)
    agree(made, wanted)
    assert any("is made 56" in warning for warning in said_of_call(pipe, made)) == (call["width"] == 57)


@pytest.fixture(scope="module")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Z-Image with heads wider than its language model's states, and an autoencoder of one convolution more."""
    small = maker("test_zimage")
    target: Path = small.make_zimage_pipeline(tmp_path_factory.mktemp("z-image") / "pipeline")
    torch.manual_seed(0)
    words = json.loads((target / "text_encoder/config.json").read_text())["vocab_size"]
    parts = {
        "transformer": diffusers.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=16,
            up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.3611, shift_factor=0.1159,
        ),
        "text_encoder": transformers.Qwen3Model(
            transformers.Qwen3Config(
                hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=words,
                num_key_value_heads=2, max_position_embeddings=512,
            )
        ),
    }  # fmt: skip
    for name, part in parts.items():
        small.noise(part).save_pretrained(target / name)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(target / "scheduler")
    return target


@pytest.mark.parametrize(("size", "strength"), [((32, 32), 1.0), ((32, 32), 0.5), ((45, 33), 0.8)])
def test_z_image_paints(zimage: Path, session_cache: Cache, size: tuple[int, int], strength: float) -> None:
    """From noise, from less noise than the schedule begins with, and in a picture whose sides do not fit."""
    width, height = (side // 4 * 4 for side in size)
    call: dict[str, Any] = {"image": picture(*size), "strength": strength, "guidance_scale": 3.0}
    call |= {"negative_prompt": "bad quality", "max_sequence_length": 16}
    wanted = reference(
        "ZImageInpaintPipeline", zimage, mask_image=hole(*size), num_inference_steps=2, width=width, height=height,
        seeds=[3], **call,
    )  # fmt: skip
    agree(pipeline(zimage, session_cache, "inpainting")(PROMPT, mask=hole(*size), steps=2, seed=3, **call), wanted)
