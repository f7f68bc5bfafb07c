"""Every family and every task against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from families import agree, original, said_of_call
from ovforge import Use
from ovforge.contracts.stages import Progress
from ovforge.errors import Cancelled, InputError, ModelError, OvforgeError
from ovforge.store.cache import Cache

F32 = Use("cpu", precision="f32")
FULL = {"weights": "f32"}
PROMPT = "a beautiful pink unicorn, 8k"

Folder = Callable[[str], Path]


def pipeline(task: str | Use, source: Path, cache: Cache, scheduler: str = "DDIMScheduler", **options: Any) -> Any:
    use = Use("diffusers", class_name=scheduler)
    load = {**FULL, **options.pop("load", {})}
    return ovforge.Pipeline(task, source=source, load=load, device=F32, cache=cache, scheduler=use, **options)


def reference(name: str, source: Path, scheduler: str = "DDIMScheduler", **parts: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = original(name, source, **parts)
    pipe.safety_checker = None
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
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


@pytest.mark.sweep
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


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("text-to-image", "StableDiffusionXLPipeline"),
        ("image-to-image", "StableDiffusionXLImg2ImgPipeline"),
        ("inpainting", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_what_a_call_leaves_out_is_as_in_diffusers(
    torch_family: Folder, session_cache: Cache, task: str, name: str
) -> None:
    call = getattr(pytest.importorskip("diffusers"), name).__call__
    theirs = {key: value.default for key, value in inspect.signature(call).parameters.items()}
    ours = pipeline(task, torch_family("xl"), session_cache).task.architecture.defaults
    assert (ours.steps, ours.guidance_scale) == (theirs["num_inference_steps"], theirs["guidance_scale"])
    assert ours.strength == theirs.get("strength", ours.strength)


@pytest.mark.sweep
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


@pytest.mark.parametrize(
    ("scheduler", "use", "given", "steps"),
    [
        ("EulerDiscreteScheduler", "euler", {"sigmas": [9.0, 3.0, 1.0, 0.0]}, 3),
        ("HeunDiscreteScheduler", "heun", {"timesteps": [900, 500, 100]}, 3),
    ],
)
def test_levels_of_a_call(
    torch_family: Folder, session_cache: Cache, scheduler: str, use: str, given: dict[str, Any], steps: int
) -> None:
    image = picture(32, 24)
    call = {"image": image, "strength": 0.7, "guidance_scale": 2.0, **given}
    theirs = reference("StableDiffusionXLImg2ImgPipeline", torch_family("xl"), scheduler)(
        PROMPT, generator=generators(11)[0], **call
    ).images
    pipe = ovforge.Pipeline(
        "image-to-image", source=torch_family("xl"), load=FULL, device=F32, cache=session_cache, scheduler=use
    )
    made = pipe(PROMPT, seed=11, **call)
    agree(made, theirs)
    said = made.provenance["inputs"]
    assert said["steps"] == steps
    agree(pipe(PROMPT, **{**call, "steps": steps, "seed": said["seed"]}), theirs)
    for wrong, message in [
        ({"steps": 7}, "7, and (sigmas|timesteps) make 3 steps"),
        ({"sigmas": [1.0, 0.0], "timesteps": [3]}, "each says it all"),
    ]:
        with pytest.raises(InputError, match=message):
            pipe(PROMPT, **{**call, **wrong})


@pytest.mark.sweep
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


def test_what_the_mask_leaves_can_be_pasted_back(torch_family: Folder, session_cache: Cache) -> None:
    image, mask = picture(32, 24), hole(32, 24)
    pipe = pipeline("inpainting", torch_family("sd1"), session_cache)
    inputs = {"image": image, "mask": mask, "steps": 3, "guidance_scale": 2.0, "seed": 5}
    plain, pasted = (pixels(pipe(PROMPT, **inputs, paste=paste)) for paste in (False, True))
    painted = np.asarray(mask)[None, ..., None] > 0
    np.testing.assert_array_equal(pasted, np.where(painted, plain, np.asarray(image)[None]))
    assert (plain != pasted).any()


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


def test_a_base_hands_what_it_painted_over_to_a_refiner(torch_family: Folder, session_cache: Cache) -> None:
    """Whose mask leaves what the base left: without noise, at a level that has some, as diffusers hands it over."""
    size, mask = {"width": 16, "height": 24}, hole(16, 24)
    call = {"num_inference_steps": 10, "mask_image": mask, **size}
    image = picture(16, 24)
    base = reference("StableDiffusionXLInpaintPipeline", torch_family("xl"))
    latents = base(
        PROMPT, image=image, denoising_end=0.6, strength=1.0, output_type="latent", generator=generators(2)[0], **call
    ).images
    refiner = reference("StableDiffusionXLInpaintPipeline", torch_family("refiner"))
    theirs = refiner(PROMPT, image=latents, denoising_start=0.6, generator=generators(3)[0], **call).images
    inputs = {"mask": mask, "steps": 10, **size}
    first = pipeline("inpainting", torch_family("xl"), session_cache)(
        PROMPT, image=image, denoising_end=0.6, strength=1.0, seed=2, **inputs
    )
    np.testing.assert_allclose(first.latents, latents.numpy(), atol=2e-3)
    pipe = pipeline("inpainting", torch_family("refiner"), session_cache)
    inputs |= {"latents": first.latents, "denoising_start": 0.6, "seed": 3}
    agree(pipe(PROMPT, **inputs), theirs)
    for wrong, message in [
        ({"latents": None}, "no picture to paint in"),
        ({"paste": True}, "needs the picture"),
        ({"strength": 0.5}, "given beside denoising_start"),
        ({"image": image}, "an image stands at the end"),
    ]:
        with pytest.raises(InputError, match=message):
            pipe(PROMPT, **{**inputs, **wrong})


def test_consistency_models_from_a_picture(torch_lcm: Path, session_cache: Cache) -> None:
    image = picture(24, 32)
    pipe = reference("LatentConsistencyModelImg2ImgPipeline", torch_lcm, "LCMScheduler", requires_safety_checker=False)
    theirs = pipe(
        PROMPT, image=image, strength=0.6, num_inference_steps=4, guidance_scale=5.5, generator=generators(4)[0]
    ).images
    ours = ovforge.Pipeline("image-to-image", source=torch_lcm, load=FULL, device=F32, cache=session_cache)
    agree(ours(PROMPT, image=image, strength=0.6, steps=4, guidance_scale=5.5, seed=4), theirs)


@pytest.fixture
def sd(torch_family: Folder, session_cache: Cache) -> Any:
    return pipeline("text-to-image", torch_family("sd1"), session_cache)


def pixels(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


SMALL = {"steps": 2, "seed": 1, "width": 16, "height": 16}


def test_own_latents_are_the_first_noise(sd: Any, tmp_path: Path) -> None:
    from ovforge.model.random import Generator

    noise = Generator(1).randn((1, 4, 8, 8))
    np.savetxt(tmp_path / "noise.txt", noise.ravel())
    np.testing.assert_array_equal(pixels(sd("a cat", **SMALL, latents=noise)), pixels(sd("a cat", **SMALL)))
    np.testing.assert_array_equal(
        pixels(sd("a cat", **SMALL, latents=tmp_path / "noise.txt")), pixels(sd("a cat", **SMALL))
    )


def test_chunks_and_weights(torch_family: Folder, session_cache: Cache, sd: Any) -> None:
    """What needs neither is untouched by them; what needs them is not cut and does count."""
    use = Use("text-to-image", prompts="weighted", long_prompts="chunks")
    both = pipeline(use, torch_family("sd1"), session_cache)
    np.testing.assert_allclose(pixels(both("a pink cat", **SMALL)), pixels(sd("a pink cat", **SMALL)) * 1.0, atol=1)
    plain = "the " * 80 + "unicorn"
    assert said_of_call(sd, sd(plain, **SMALL))
    long, other = both(plain, **SMALL), both("the " * 80 + "cat", **SMALL)
    assert not said_of_call(both, long)
    assert (long.latents != other.latents).any()
    assert (both("a (pink:1.6) cat", **SMALL).latents != sd("a pink cat", **SMALL).latents).any()
    assert (both("a BREAK cat", **SMALL).latents != sd("a cat", **SMALL).latents).any()
    assert not said_of_call(
        both, both("a cat " + "x" * 200, **SMALL)
    )  # one word of more than a chunk goes on in the next
    batch = both(["a cat", plain], negative_prompt="blue", steps=2, seed=[1, 1], width=16, height=16)
    assert len(batch.images) == 2
    cut = pipeline(Use("text-to-image", prompts="weighted"), torch_family("sd1"), session_cache)
    with pytest.raises(InputError, match="BREAK begins another chunk"):
        cut("a BREAK cat", **SMALL)
    assert "cut off: 'unicorn'" in cut("(" + "the " * 75 + "unicorn:1.2)", **SMALL).warnings[0]


def test_weighted_states_are_the_web_uis(torch_family: Folder, session_cache: Cache, sd: Any) -> None:
    """States times weights, with the mean of before."""
    from ovforge.model.results import Timings
    from ovforge_diffusion.text import TextEncoder, TextEncoders
    from ovforge_diffusion.tokenizer import FileTokenizer

    tokenizer = FileTokenizer(sd.compiled.assets, "tokenizer")
    encoder = TextEncoder(tokenizer, sd.compiled["text_encoder"], penultimate=False)
    plain, _ = TextEncoders([encoder], weighted=False, chunks=False).encode([("a cat", "a cat")], Timings())
    made, _ = TextEncoders([encoder], weighted=True, chunks=True).encode([("a (cat:1.5)", "")], Timings())
    wanted = plain.states.copy()
    wanted[:, 2] *= 1.5
    wanted *= plain.states.mean() / wanted.mean()
    np.testing.assert_allclose(made.states, wanted, atol=1e-5)


def test_low_memory_holds_one_role_at_a_time(torch_family: Folder, session_cache: Cache, sd: Any) -> None:
    low = pipeline(Use("text-to-image", low_memory=True), torch_family("sd1"), session_cache)
    assert not low.compiled.wanted
    for _ in range(2):
        result = low("a cat", **SMALL)
        np.testing.assert_array_equal(pixels(result), pixels(sd("a cat", **SMALL)))
        assert all(model.model is None for _, model in low.compiled.all())
    assert set(result.provenance["precision"].values()) == {"f32"}


def test_previews_and_cancelling(sd: Any) -> None:
    seen: list[Any] = []

    def watch(moment: Progress) -> None:
        if moment.preview is not None:
            seen.append(moment.preview())
            if len(seen) == 3:
                raise Cancelled

    with pytest.raises(Cancelled):
        sd("a cat", steps=9, seed=1, width=16, height=24, progress=watch)
    assert len(seen) == 3
    assert {image.size for images in seen for image in images} == {(16, 24)}
    before = pixels(sd("a cat", **SMALL))
    np.testing.assert_array_equal(pixels(sd("a cat", **SMALL, progress=lambda m: m.preview and m.preview())), before)


def test_tiles_show_no_border() -> None:
    """With trained weights: a large picture in tiles beside the whole one, and no jump where tiles meet."""
    from importlib.util import find_spec

    if find_spec("ovforge_lcm") is None:
        pytest.skip("needs the embedded model")
    source = "package:ovforge_lcm/model"
    whole = ovforge.Pipeline("image-to-image", source=source, device=F32, cache=None).task
    tiled = ovforge.Pipeline(Use("image-to-image", tile=128), source=source, device=F32, cache=None).task
    with Image.open(Path(__file__).parents[1] / "docs/images/unicorn.png") as unicorn:
        image = unicorn.convert("RGB").resize((384, 256))
    values = np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)
    family = whole.architecture
    latents = whole.autoencoder.encode(values)[: family.latent_channels] * np.float32(family.encoding.factor)
    assert tiled.autoencoder.tile(256, 384) == 128
    one, other = (np.asarray(task.autoencoder.decode(latents), np.float32).mean(axis=2) for task in (whole, tiled))
    assert np.abs(one - other).mean() < 3  # tiles have their own statistics: a shade, and no border
    for axis in (0, 1):
        jumps = np.abs(np.diff(other - one, axis=axis)).mean(axis=1 - axis)
        assert jumps.max() < np.abs(np.diff(one, axis=axis)).mean(axis=1 - axis).max()
    moments = tiled.autoencoder.encode(values)[: family.latent_channels]
    assert np.abs(moments * family.decoding.factor - latents).mean() < 0.2 * np.abs(latents).mean()


def test_a_picture_from_a_picture_is_made_again(torch_family: Folder, session_cache: Cache, tmp_path: Path) -> None:
    picture(32, 24).save(tmp_path / "in.png")
    pipe = pipeline("image-to-image", torch_family("sd1"), session_cache)
    result = pipe("a cat", image=tmp_path / "in.png", strength=0.5, steps=4, seed=2)
    [file] = result.save(tmp_path / "out.png")
    again = ovforge.load(file, cache=session_cache, trust=True)()
    np.testing.assert_array_equal(pixels(again), pixels(result))
    in_memory = pipe("a cat", image=picture(32, 24), strength=0.5, steps=4, seed=2)
    np.testing.assert_array_equal(pixels(in_memory), pixels(result))
    [file] = in_memory.save(tmp_path / "out2.png")
    with pytest.raises(OvforgeError, match="only its digest is known"):
        ovforge.load(file, cache=session_cache, trust=True)()


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        ("inpainting", {"image": picture(16, 16), "mask": hole(24, 16)}, "mask: is 24x16, and the picture is 16x16"),
        ("inpainting", {"image": Path("nowhere.png"), "mask": hole(24, 16)}, "nowhere.png"),
        ("image-to-image", {}, "no picture to start from"),
        ("image-to-image", {"image": picture(16, 16), "latents": np.zeros((1, 4, 8, 8))}, "beside an image"),
        ("image-to-image", {"image": picture(16, 16), "strength": 0.1, "steps": 4}, "less than one"),
        ("image-to-image", {"image": picture(16, 16), "denoising_start": 0.5}, "denoising_start"),
        ("image-to-image", {"image": [picture(16, 16)] * 3}, "3 pictures for 1 prompts"),
        ("text-to-image", {"control": picture(16, 16)}, "1 given for 0 ControlNets"),
        ("text-to-image", {"prompt_2": "x"}, "one text encoder"),
        ("text-to-image", {"guidance_scale": 1.0, "guidance_rescale": 0.5}, "no effect without guidance"),
        ("text-to-image", {"latents": np.zeros((1, 4, 3, 3))}, "is needed"),
        ("text-to-image", {"denoising_end": 0.01, "steps": 2}, "no step left"),
        ("text-to-image", {"denoising_end": 0.5, "decode": True}, "make no picture"),
    ],
)
def test_bad_inputs_are_said(
    torch_family: Folder, session_cache: Cache, task: str, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(OvforgeError) as raised:
        pipeline(task, torch_family("sd1"), session_cache)("a cat", **inputs)
    assert message in str(raised.value)


def test_a_model_for_inpainting_says_so(torch_family: Folder, session_cache: Cache) -> None:
    with pytest.raises(ModelError, match="made for inpainting"):
        pipeline("text-to-image", torch_family("inpaint"), session_cache)("a cat", steps=1)


def test_latents_can_be_saved(torch_family: Folder, session_cache: Cache, sd: Any, tmp_path: Path) -> None:
    result = sd("a cat", **SMALL, decode=False)
    with pytest.raises(InputError, match="latents and no picture"):
        result.save(tmp_path / "a.png")
    [file] = result.save(tmp_path / "a.npy")
    np.testing.assert_array_equal(np.load(file), result.latents)
