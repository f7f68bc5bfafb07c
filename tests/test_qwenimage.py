"""Qwen-Image: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families import agree, maker, original, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import InputError
from ovforge.model import BatchGenerator
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a beautiful pink unicorn, 8k"
LONG = "a cat in a hat on a mat, " * 12
PIPELINES = {
    "text-to-image": "QwenImagePipeline", "image-to-image": "QwenImageImg2ImgPipeline",
    "inpainting": "QwenImageInpaintPipeline",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = maker("test_qwenimage").make_qwenimage_pipeline(tmp_path_factory.mktemp("qwenimage") / "pipeline")
    return made


def theirs(source: Path, task: str, prompt: Any, *, steps: int, seeds: list[int], **call: Any) -> list[Image.Image]:
    pipe = original(PIPELINES[task], source)
    made: list[Image.Image] = pipe(prompt, **call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.parametrize(
    ("width", "height", "call"),
    [
        (32, 32, {}),
        (42, 24, {"negative_prompt": ""}),
        (20, 52, {"negative_prompt": "blue, <|im_end|> ü\n ", "true_cfg_scale": 2.5}),
    ],
)
def test_text_to_image(folder: Path, session_cache: Cache, width: int, height: int, call: dict[str, Any]) -> None:
    """Without guidance, with that of an empty prompt, and with a scale of its own; sides that do not fit."""
    size = {"width": width, "height": height}
    wanted = theirs(folder, "text-to-image", PROMPT, steps=4, seeds=[3], **size, **call)
    agree(ours(folder, session_cache)(PROMPT, steps=4, seed=3, **size, **call), wanted)


def test_a_batch_with_long_and_negative_prompts(folder: Path, session_cache: Cache) -> None:
    """Texts of different lengths beside each other, one of them cut off, as each is alone; halves in one call or two."""
    prompts, negative = [PROMPT, LONG], ["blue " * 9, " "]
    call: dict[str, Any] = {"width": 24, "height": 16, "true_cfg_scale": 2.0, "max_sequence_length": 80}
    wanted = theirs(
        folder, "text-to-image", list(prompts), negative_prompt=list(negative), steps=3, seeds=[1, 2], **call
    )
    for guidance in ("joint", "split"):
        pipe = ours(folder, session_cache, Use("text-to-image", guidance=guidance))
        made = pipe(prompts, negative_prompt=negative, steps=3, seed=[1, 2], **call)
        agree(made, wanted)
        assert [warning for warning in said_of_call(pipe, made) if "the 80 tokens" in warning and "cut off" in warning]
    alone = pipe(LONG, negative_prompt=negative[1], steps=3, seed=2, **call)
    np.testing.assert_allclose(alone.latents[0], made.latents[1], atol=1e-3)


@pytest.mark.parametrize(("task", "strength"), [("image-to-image", 0.55), ("inpainting", 0.7), ("inpainting", 1.0)])
def test_from_a_picture(folder: Path, session_cache: Cache, task: str, strength: float) -> None:
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(small).resize((40, 24), Image.Resampling.BICUBIC)
    hole = np.zeros((24, 40), np.uint8)
    hole[6:12, 10:30] = 255
    masks = (
        ({"mask_image": Image.fromarray(hole)}, {"mask": Image.fromarray(hole)}) if task == "inpainting" else ({}, {})
    )
    call = {"image": image, "strength": strength, "negative_prompt": "blue", "true_cfg_scale": 1.5}
    wanted = theirs(folder, task, PROMPT, steps=5, seeds=[5], width=40, height=24, **masks[0], **call)
    agree(ours(folder, session_cache, task)(PROMPT, steps=5, seed=5, **masks[1], **call), wanted)


def test_low_memory_previews_latents_and_tiles(folder: Path, session_cache: Cache) -> None:
    seen: list[Any] = []
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 24, "height": 16}
    pipe = ours(folder, session_cache, Use("text-to-image", low_memory=True))
    first = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
    assert {image.size for images in seen if images for image in images} == {(24, 16)}
    noise = BatchGenerator([1]).randn((1, 16, 8, 12))
    np.testing.assert_array_equal(pipe(PROMPT, **call, latents=noise).latents, first.latents)
    assert all(model.model is None for _, model in pipe.compiled.all())
    tiled = ours(folder, session_cache, Use("text-to-image", tile=64))(PROMPT, steps=2, seed=1, width=96, height=64)
    assert tiled.images[0].size == (96, 64)


def test_what_cannot_be_is_said(folder: Path, session_cache: Cache) -> None:
    pipe = ours(folder, session_cache)
    for inputs, message in (
        ({"true_cfg_scale": 1.0, "negative_prompt": "x"}, "no effect without guidance"),
        ({"true_cfg_scale": 2.0}, "no effect without a negative prompt"),
        ({"prompt_2": "x"}, "one text encoder"),
    ):
        with pytest.raises(InputError) as raised:
            pipe(PROMPT, steps=2, **inputs)
        assert message in str(raised.value)
    made = pipe(PROMPT, steps=2, width=16, height=16, guidance_scale=3.0, max_sequence_length=1024)
    assert [warning for warning in made.warnings if "guidance_scale has no effect" in warning]
