"""Z-Image: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from families import agree, maker, original, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import InputError, ModelError
from ovforge.model import BatchGenerator
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a beautiful pink unicorn, 8k"
LONG = "a cat in a hat on a mat, " * 12
PIPELINES = {
    "text-to-image": "ZImagePipeline", "image-to-image": "ZImageImg2ImgPipeline", "inpainting": "ZImageInpaintPipeline",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = maker("test_zimage")
    made: Path = small.make_zimage_pipeline(tmp_path_factory.mktemp("zimage") / "pipeline")
    return made


def theirs(source: Path, task: str, prompt: Any, *, steps: int, seeds: list[int], **call: Any) -> list[Image.Image]:
    pipe = original(PIPELINES[task], source)
    made: list[Image.Image] = pipe(prompt, **call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.parametrize(("width", "height", "guidance"), [(32, 32, 0.0), (40, 24, 1.0), (20, 52, 4.0)])
def test_text_to_image(folder: Path, session_cache: Cache, width: int, height: int, guidance: float) -> None:
    call = {"width": width, "height": height, "guidance_scale": guidance}
    wanted = theirs(folder, "text-to-image", PROMPT, steps=4, seeds=[3], **call)
    agree(ours(folder, session_cache)(PROMPT, steps=4, seed=3, **call), wanted)


@pytest.mark.parametrize(
    "options", [{"cfg_normalization": 0.6}, {"cfg_truncation": 0.3}, {"cfg_normalization": 1.0, "cfg_truncation": 0.6}]
)
def test_how_guidance_acts(folder: Path, session_cache: Cache, options: dict[str, float]) -> None:
    """No further than some times the norm, and until a picture has a share of itself: in whole runs, and from there."""
    image, mask = (Image.new(mode, (24, 16), colour) for mode, colour in (("RGB", "teal"), ("L", "white")))
    mask.paste(0, (0, 0, 12, 16))
    call: dict[str, Any] = {"guidance_scale": 4.0, "width": 24, "height": 16, **options}
    wanted = theirs(folder, "text-to-image", PROMPT, steps=5, seeds=[3], **call)
    pipe = ours(folder, session_cache)
    agree(pipe(PROMPT, steps=5, seed=3, **call), wanted)
    with pytest.raises(AssertionError):
        agree(pipe(PROMPT, steps=5, seed=3, **{**call, **dict.fromkeys(options)}), wanted)
    call |= {"image": image, "strength": 0.7}
    wanted = theirs(folder, "inpainting", PROMPT, steps=5, seeds=[3], mask_image=mask, **call)
    agree(ours(folder, session_cache, "inpainting")(PROMPT, steps=5, seed=3, mask=mask, **call), wanted)
    with pytest.raises(InputError, match="no effect without guidance"):
        pipe(PROMPT, steps=1, guidance_scale=0.0, **options)


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_a_batch_with_long_and_negative_prompts(folder: Path, session_cache: Cache, guidance: str) -> None:
    """Texts of 32 tokens, 64 and more beside each other, one of them cut off, as each is alone."""
    prompts, negative = [PROMPT, LONG], ["blue " * 9, "<|im_end|> ü\n "]
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0, "max_sequence_length": 80}
    wanted = theirs(
        folder, "text-to-image", list(prompts), negative_prompt=list(negative), steps=3, seeds=[1, 2], **call
    )
    pipe = ours(folder, session_cache, Use("text-to-image", guidance=guidance))
    made = pipe(prompts, negative_prompt=negative, steps=3, seed=[1, 2], **call)
    agree(made, wanted)
    assert len([warning for warning in said_of_call(pipe, made) if "cut off" in warning]) == 1
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
    call = {"image": image, "strength": strength, "guidance_scale": 1.5}
    wanted = theirs(folder, task, PROMPT, steps=5, seeds=[5], width=40, height=24, **masks[0], **call)
    agree(ours(folder, session_cache, task)(PROMPT, steps=5, seed=5, **masks[1], **call), wanted)


def test_shifts_that_follow_the_size_and_a_template_in_the_config(
    folder: Path, session_cache: Cache, tmp_path: Path
) -> None:
    """As older folders have the template: in tokenizer_config.json, here with another text and special tokens."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "tokenizer/chat_template.jinja").unlink()
    path = copy / "tokenizer/tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ pad_token }}{{ m['content'] | trim }} says {{ m.role }}{{ eos_token }}{% endfor %}"
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    path = copy / "scheduler/scheduler_config.json"
    shifts = {"use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **shifts}))
    call = {"width": 40, "height": 24, "guidance_scale": 2.0}
    wanted = theirs(copy, "text-to-image", f"  {PROMPT} ", steps=4, seeds=[3], **call)
    agree(ours(copy, session_cache)(f"  {PROMPT} ", steps=4, seed=3, **call), wanted)


def test_low_memory_previews_and_latents(folder: Path, session_cache: Cache) -> None:
    seen: list[Any] = []
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 24, "height": 16}
    pipe = ours(folder, session_cache, Use("text-to-image", low_memory=True))
    first = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
    assert {image.size for images in seen if images for image in images} == {(24, 16)}
    noise = BatchGenerator([1]).randn((1, 16, 8, 12))
    np.testing.assert_array_equal(pipe(PROMPT, **call, latents=noise).latents, first.latents)
    assert all(model.model is None for _, model in pipe.compiled.all())


def test_what_cannot_be_is_said(folder: Path, session_cache: Cache, tmp_path: Path) -> None:
    pipe = ours(folder, session_cache)
    for inputs, message in (
        ({"width": 42, "height": 16}, "42 is not a multiple of 4"),
        ({"guidance_scale": 0.0, "negative_prompt": "x"}, "no effect without guidance"),
        ({"true_cfg_scale": 2.0}, "Set guidance_scale"),
        ({"prompt_2": "x"}, "one text encoder"),
    ):
        with pytest.raises(InputError) as raised:
            pipe(PROMPT, steps=1, **inputs)
        assert message in str(raised.value)
    copy = tmp_path / "converted"
    ovforge.open_model(folder, cache=session_cache, options={"weights": "f32"}).save(copy)
    path = copy / "tokenizer/chat_template.jinja"
    for template, message in (
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot be applied: access to attribute '__class__'"),
        ("{% if %}", "cannot be applied: Expected an expression"),
        ("{{ raise_exception('no system prompt') }}", "cannot be applied: no system prompt"),
        (None, "has no chat template"),
    ):
        if template is None:
            path.unlink()
        else:
            path.write_text(template)
        with pytest.raises(ModelError, match=message):
            ovforge.Pipeline("text-to-image", source=copy, cache=session_cache)(PROMPT, steps=1, width=16, height=16)
