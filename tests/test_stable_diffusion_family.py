"""Every family and every task against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from families import agree
from ovforge import Use
from ovforge.cache import Cache

F32 = Use("cpu", precision="f32")
FULL = {"weights": "f32"}
PROMPT = "a beautiful pink unicorn, 8k"

Folder = Callable[[str], Path]


def pipeline(task: str | Use, source: Path, cache: Cache, scheduler: str = "DDIMScheduler", **options: Any) -> Any:
    use = Use("diffusers", class_name=scheduler)
    load = {**FULL, **options.pop("load", {})}
    return ovforge.Pipeline(task, source=source, load=load, device=F32, cache=cache, scheduler=use, **options)


def reference(name: str, source: Path, scheduler: str = "DDIMScheduler", **parts: Any) -> Any:
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipe = getattr(diffusers, name).from_pretrained(source, **parts)
    pipe.safety_checker = None
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[Any]:
    torch = pytest.importorskip("torch")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a smooth picture with a few shapes in it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def hole(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : -width // 4] = 255
    return Image.fromarray(mask)


FAMILIES = {
    "sd1": ("StableDiffusionPipeline", {"width": 24, "height": 32}),
    "sd2": ("StableDiffusionPipeline", {"width": 32, "height": 16}),
    "xl": ("StableDiffusionXLPipeline", {"width": 32, "height": 24}),
}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_image(torch_family: Folder, session_cache: Cache, family: str, scheduler: str) -> None:
    name, size = FAMILIES[family]
    theirs = reference(name, torch_family(family), scheduler)(
        [PROMPT, "the blue cat!!"], negative_prompt=["photo", ""], num_inference_steps=4, guidance_scale=2.0,
        generator=generators(7, 8), **size,
    ).images  # fmt: skip
    pipe = pipeline("text-to-image", torch_family(family), session_cache, scheduler)
    inputs = {"prompt": [PROMPT, "the blue cat!!"], "negative_prompt": ["photo", ""], "seed": [7, 8], "steps": 4}
    agree(pipe(**inputs, guidance_scale=2.0, **size), theirs)


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_both_ways_of_guidance(torch_family: Folder, session_cache: Cache, family: str, guidance: str) -> None:
    """Also without a negative prompt: SDXL takes zeros then; and with the guidance rescaled."""
    theirs = reference(FAMILIES[family][0], torch_family(family))(
        PROMPT, num_inference_steps=3, guidance_scale=3.0, guidance_rescale=0.7, width=16, height=16,
        generator=generators(3)[0],
    ).images  # fmt: skip
    pipe = pipeline(Use("text-to-image", guidance=guidance), torch_family(family), session_cache)
    ours = pipe(PROMPT, steps=3, guidance_scale=3.0, guidance_rescale=0.7, width=16, height=16, seed=3)
    agree(ours, theirs)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_image_to_image(torch_family: Folder, session_cache: Cache, family: str, strength: float) -> None:
    image = picture(32, 24)
    name = "StableDiffusionXLImg2ImgPipeline" if family == "xl" else "StableDiffusionImg2ImgPipeline"
    theirs = reference(name, torch_family(family))(
        PROMPT, image=image, strength=strength, num_inference_steps=6, guidance_scale=2.0, generator=generators(11)[0]
    ).images
    pipe = pipeline("image-to-image", torch_family(family), session_cache)
    agree(pipe(PROMPT, image=image, strength=strength, steps=6, guidance_scale=2.0, seed=11), theirs)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    ("family", "scheduler"),
    [("sd1", "DDIMScheduler"), ("sd1", "EulerAncestralDiscreteScheduler"), ("inpaint", "DDIMScheduler")],
)
def test_inpainting(torch_family: Folder, session_cache: Cache, family: str, scheduler: str, strength: float) -> None:
    image, mask = picture(32, 24), hole(32, 24)
    theirs = reference("StableDiffusionInpaintPipeline", torch_family(family), scheduler)(
        PROMPT, image=image, mask_image=mask, strength=strength, num_inference_steps=5, guidance_scale=2.0,
        width=32, height=24, generator=generators(5)[0],
    ).images  # fmt: skip
    pipe = pipeline("inpainting", torch_family(family), session_cache, scheduler)
    ours = pipe(PROMPT, image=image, mask=mask, strength=strength, steps=5, guidance_scale=2.0, seed=5)
    agree(ours, theirs)


def test_a_base_hands_over_to_a_refiner(torch_family: Folder, session_cache: Cache) -> None:
    base = reference("StableDiffusionXLPipeline", torch_family("xl"))
    latents = base(
        PROMPT, num_inference_steps=10, denoising_end=0.6, width=16, height=24, output_type="latent",
        generator=generators(2)[0],
    ).images  # fmt: skip
    refiner = reference("StableDiffusionXLImg2ImgPipeline", torch_family("refiner"))
    theirs = refiner(
        PROMPT, image=latents, num_inference_steps=10, denoising_start=0.6, generator=generators(3)[0]
    ).images
    first = pipeline("text-to-image", torch_family("xl"), session_cache)(
        PROMPT, steps=10, denoising_end=0.6, width=16, height=24, seed=2
    )
    assert not first.images
    np.testing.assert_allclose(first.latents, latents.numpy(), atol=2e-3)
    second = pipeline("image-to-image", torch_family("refiner"), session_cache)(
        PROMPT, latents=first.latents, denoising_start=0.6, width=16, height=24, steps=10, seed=3
    )
    agree(second, theirs)


def test_consistency_models_from_a_picture(torch_lcm: Path, session_cache: Cache) -> None:
    image = picture(24, 32)
    pipe = reference("LatentConsistencyModelImg2ImgPipeline", torch_lcm, "LCMScheduler", requires_safety_checker=False)
    theirs = pipe(
        PROMPT, image=image, strength=0.6, num_inference_steps=4, guidance_scale=5.5, generator=generators(4)[0]
    ).images
    ours = ovforge.Pipeline("image-to-image", source=torch_lcm, load=FULL, device=F32, cache=session_cache)
    agree(ours(PROMPT, image=image, strength=0.6, steps=4, guidance_scale=5.5, seed=4), theirs)
