"""Diffusion transformers: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from families import agree, leave_out, maker, original, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.model import BatchGenerator
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a beautiful pink unicorn, 8k"
LONG = "a cat in a hat on a mat, " * 30
NAMES = {
    ("sd3", "text-to-image"): "StableDiffusion3Pipeline",
    ("sd3", "image-to-image"): "StableDiffusion3Img2ImgPipeline",
    ("sd3", "inpainting"): "StableDiffusion3InpaintPipeline",
    ("flux", "text-to-image"): "FluxPipeline",
    ("flux", "image-to-image"): "FluxImg2ImgPipeline",
    ("flux", "inpainting"): "FluxInpaintPipeline",
    ("fill", "inpainting"): "FluxFillPipeline",
    ("kontext", "text-to-image"): "FluxKontextPipeline",
    ("kontext", "image-to-image"): "FluxKontextPipeline",
    ("kontext", "inpainting"): "FluxKontextInpaintPipeline",
}
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function that gives the diffusers folder of a family, made once."""
    small = maker("test_transformers")
    changes: dict[str, dict[str, Any]] = {
        "sd3": {}, "flux": {}, "schnell": {"guidance_embeds": False}, "fill": {"in_channels": 144, "out_channels": 64},
        "kontext": {},
    }  # fmt: skip
    made: dict[str, Path] = {}

    def give(family: str) -> Path:
        if family not in made:
            target = tmp_path_factory.mktemp(family) / "pipeline"
            kind = "sd3" if family == "sd3" else "flux"
            made[family] = small.make_transformer_pipeline(target, torch_lcm, kind, **changes[family])
            if family == "kontext":
                index = made[family] / "model_index.json"
                index.write_text(index.read_text().replace("FluxPipeline", "FluxKontextPipeline"))
        return made[family]

    return give


def theirs(family: str, task: str, source: Path, *prompts: Any, seeds: list[int], **call: Any) -> list[Image.Image]:
    pipe = original(NAMES["flux" if family == "schnell" else family, task], source)
    made: list[Image.Image] = pipe(*prompts, **call, generator=seeded(seeds)).images
    return made


def picture(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def hole(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : -width // 4] = 255
    return Image.fromarray(mask)


SIZES = [(16, 16, 7.0), (40, 24, 1.0), (20, 32, 2.5)]


@pytest.mark.parametrize(
    ("family", "width", "height", "guidance"),
    [*(("sd3", *size) for size in SIZES), *(("flux", *size) for size in SIZES), ("schnell", 40, 24, 0.0)],
)
def test_text_to_image(
    folder: Folder, session_cache: Cache, family: str, width: int, height: int, guidance: float
) -> None:
    size = {"width": width, "height": height, "guidance_scale": guidance}
    wanted = theirs(family, "text-to-image", folder(family), PROMPT, num_inference_steps=4, seeds=[3], **size)
    made = ours(folder(family), session_cache)(PROMPT, steps=4, seed=3, **size)
    agree(made, wanted)
    assert any("no effect" in warning for warning in made.warnings) == (family == "schnell")


@pytest.mark.parametrize("guidance", ["joint", "split"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_batch_with_long_and_negative_prompts(
    folder: Folder, session_cache: Cache, family: str, guidance: str
) -> None:
    prompts, negative = [PROMPT, LONG], ["blue", ""]
    size: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 4.0, "max_sequence_length": 40}
    size |= {"true_cfg_scale": 2.0} if family == "flux" else {}
    wanted = theirs(
        family, "text-to-image", folder(family), prompts, negative_prompt=negative, num_inference_steps=3,
        seeds=[1, 2], prompt_2=["the blue cat!!", LONG], **size,
    )  # fmt: skip
    pipe = ours(folder(family), session_cache, Use("text-to-image", guidance=guidance))
    second = ["the blue cat!!", LONG]
    made = pipe(prompts, negative_prompt=negative, prompt_2=second, steps=3, seed=[1, 2], **size)
    agree(made, wanted)
    said = said_of_call(pipe, made)
    assert len([warning for warning in said if "cut off" in warning]) == 2, "CLIP reads less than T5 does"


@pytest.mark.parametrize("strength", [0.55, 1.0])
@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_from_a_picture(folder: Folder, session_cache: Cache, family: str, task: str, strength: float) -> None:
    image, mask = picture(40, 24), hole(40, 24)
    masks = ({"mask_image": mask}, {"mask": mask}) if task == "inpainting" else ({}, {})
    size = {"width": 40, "height": 24}
    call: dict[str, Any] = {"image": image, "strength": strength, "guidance_scale": 3.0}
    steps = {"num_inference_steps": 7}
    wanted = theirs(family, task, folder(family), PROMPT, seeds=[5], **masks[0], **call, **steps, **size)
    pipe = ours(folder(family), session_cache, task)
    agree(pipe(PROMPT, steps=7, seed=5, **masks[1], **call), wanted)
    call["sigmas"] = [1.0, 0.8, 0.3]
    wanted = theirs(family, task, folder(family), PROMPT, seeds=[5], **masks[0], **call, **size)
    agree(pipe(PROMPT, seed=5, **masks[1], **call), wanted)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_texts_of_a_length_that_was_not_foreseen(folder: Folder, session_cache: Cache, family: str) -> None:
    """Models are compiled for what the config says; a call may say another length, and the first one again."""
    size: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 3.0}
    pipe = ours(folder(family), session_cache, input={"width": 24, "height": 16})
    for length in (None, 17, None):
        more = {} if length is None else {"max_sequence_length": length}
        wanted = theirs(
            family, "text-to-image", folder(family), PROMPT, num_inference_steps=2, seeds=[3], **size, **more
        )
        agree(pipe(PROMPT, steps=2, seed=3, **size, **more), wanted)


@pytest.mark.parametrize("layers", [[0], [1, 2]])
def test_guidance_away_from_skipped_layers(folder: Folder, session_cache: Cache, layers: list[int]) -> None:
    """Of a picture's and a text's stream, of layers with one attention and with two, in a part of the steps."""
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 3.0, "skip_guidance_layers": layers}
    call |= {"skip_layer_guidance_scale": 4.0, "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    wanted = theirs(
        "sd3", "text-to-image", folder("sd3"), [PROMPT] * 2, num_inference_steps=6, seeds=[3, 4],
        negative_prompt=["blue"] * 2, **call,
    )  # fmt: skip
    pipe = ours(folder("sd3"), session_cache)
    agree(pipe([PROMPT] * 2, negative_prompt=["blue"] * 2, steps=6, seed=[3, 4], **call), wanted)
    plain = {name: value for name, value in call.items() if "skip" not in name}
    with pytest.raises(AssertionError):  # without, the picture is another
        agree(pipe([PROMPT] * 2, negative_prompt=["blue"] * 2, steps=6, seed=[3, 4], **plain), wanted)


def test_clip_skip_leaves_the_last_layers_out(folder: Folder, session_cache: Cache) -> None:
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 3.0}
    wanted = theirs(
        "sd3", "text-to-image", folder("sd3"), PROMPT, num_inference_steps=3, seeds=[3], clip_skip=1, **call
    )
    pipe = ours(folder("sd3"), session_cache, transforms=[Use("clip-skip", layers=1)])
    agree(pipe(PROMPT, steps=3, seed=3, **call), wanted)


def test_fill_paints_by_what_it_sees_of_the_mask(folder: Folder, session_cache: Cache) -> None:
    image, mask = picture(24, 40), hole(24, 40)
    call: dict[str, Any] = {"image": image, "guidance_scale": 30.0}
    wanted = theirs(
        "fill", "inpainting", folder("fill"), PROMPT, seeds=[5], mask_image=mask, num_inference_steps=3, width=24,
        height=40, **call,
    )  # fmt: skip
    agree(ours(folder("fill"), session_cache, "inpainting")(PROMPT, steps=3, seed=5, mask=mask, **call), wanted)
    with pytest.raises(ModelError, match="made for inpainting"):
        ours(folder("fill"), session_cache)(PROMPT, steps=1)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_shifts_that_follow_the_size(folder: Folder, session_cache: Cache, tmp_path: Path, family: str) -> None:
    """As the scheduler's config says: in the folder, and in what the same folder was converted to before."""
    config: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.3}
    source = Path(shutil.copytree(folder(family), tmp_path / "model"))
    converted = tmp_path / "converted"
    ovforge.open_model(folder(family), cache=session_cache, options={"weights": "f32"}).save(converted)
    for place in (source, converted):
        path = place / "scheduler/scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    call = {"width": 40, "height": 24, "guidance_scale": 2.0}
    wanted = theirs(family, "text-to-image", source, PROMPT, num_inference_steps=4, seeds=[3], **call)
    pipe = ovforge.Pipeline("text-to-image", source=converted, device=Use("cpu", precision="f32"), cache=session_cache)
    agree(pipe(PROMPT, steps=4, seed=3, **call), wanted)


def test_t5_may_be_left_out(folder: Folder, session_cache: Cache, tmp_path: Path) -> None:
    source = leave_out(folder("sd3"), tmp_path / "model", "text_encoder_3", "tokenizer_3")
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 3.0}
    wanted = theirs("sd3", "text-to-image", source, PROMPT, num_inference_steps=3, seeds=[3], **call)
    pipe = ours(source, session_cache)
    agree(pipe(PROMPT, steps=3, seed=3, **call), wanted)
    with pytest.raises(InputError, match="two text encoders"):
        pipe(PROMPT, prompt_3="x")


@pytest.fixture
def kontext_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Kontext see pictures of a thirtieth of its sizes, since this autoencoder makes few of many pixels."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as original
    from diffusers.pipelines.flux import pipeline_flux_kontext_inpaint as inpainting

    from ovforge_diffusion.architectures import flux

    assert list(flux.KONTEXT_SIZES) == original.PREFERRED_KONTEXT_RESOLUTIONS
    small = [(width // 30, height // 30) for width, height in flux.KONTEXT_SIZES]
    monkeypatch.setattr(flux, "KONTEXT_SIZES", small)
    for module in (original, inpainting):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", small)


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_kontext_edits_what_it_sees(folder: Folder, session_cache: Cache, kontext_sizes: None, guidance: str) -> None:
    size: dict[str, Any] = {"width": 40, "height": 24}
    call: dict[str, Any] = {**size, "guidance_scale": 2.5, "true_cfg_scale": 2.0, "negative_prompt": "blue"}
    image = picture(70, 31)
    pipe = ours(folder("kontext"), session_cache, Use("image-to-image", guidance=guidance))
    wanted = theirs(
        "kontext", "image-to-image", folder("kontext"), seeds=[5], prompt=PROMPT, image=image, num_inference_steps=3,
        max_area=40 * 24, **call,
    )  # fmt: skip
    agree(pipe(PROMPT, image=image, steps=3, seed=5, **call), wanted)
    two = [image, picture(33, 90)]
    wanted = theirs(
        "kontext", "image-to-image", folder("kontext"), seeds=[1, 2], prompt=[PROMPT, LONG], image=two,
        num_inference_steps=2, max_area=40 * 24, **size,
    )  # fmt: skip
    agree(pipe([PROMPT, LONG], image=two, steps=2, seed=[1, 2], **size), wanted)
    with pytest.raises(InputError, match="sees the whole picture"):
        pipe(PROMPT, image=image, strength=0.5)
    with pytest.raises(InputError, match="no picture to edit"):
        pipe(PROMPT)
    with pytest.raises(InputError, match="3 pictures for 1 prompts"):
        pipe(PROMPT, image=[image] * 3)


def test_kontext_without_a_picture(folder: Folder, session_cache: Cache) -> None:
    call: dict[str, Any] = {"width": 24, "height": 40}
    wanted = theirs(
        "kontext", "text-to-image", folder("kontext"), seeds=[5], prompt=PROMPT, num_inference_steps=3,
        max_area=40 * 24, **call,
    )  # fmt: skip
    agree(ours(folder("kontext"), session_cache)(PROMPT, steps=3, seed=5, **call), wanted)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_kontext_paints_in_a_picture_that_it_sees(
    folder: Folder, session_cache: Cache, kontext_sizes: None, strength: float
) -> None:
    image, mask = picture(70, 31), hole(70, 31)
    call: dict[str, Any] = {"image": image, "guidance_scale": 2.5, "strength": strength}
    call |= {"true_cfg_scale": 2.0, "negative_prompt": "blue"} if strength < 1 else {}
    wanted = theirs(
        "kontext",
        "inpainting",
        folder("kontext"),
        seeds=[5],
        prompt=PROMPT,
        mask_image=mask,
        num_inference_steps=4,
        **call,
    )
    made = ours(folder("kontext"), session_cache, "inpainting")(PROMPT, mask=mask, steps=4, seed=5, **call)
    agree(made, wanted)
    assert made.images[0].size == wanted[0].size != (70, 31), "of a size that Kontext was trained on"
    other = picture(33, 90)
    wanted = theirs(
        "kontext", "inpainting", folder("kontext"), seeds=[5], prompt=PROMPT, mask_image=mask, num_inference_steps=2,
        image_reference=other, **call,
    )  # fmt: skip
    pipe = ours(folder("kontext"), session_cache, "inpainting")
    again = pipe(PROMPT, mask=mask, steps=2, seed=5, reference=other, **call)
    agree(again, wanted)
    with pytest.raises(InputError, match="no other picture to see"):
        ours(folder("flux"), session_cache, "inpainting")(PROMPT, image=image, mask=mask, reference=other)


def test_kontext_paints_in_a_part(folder: Folder, session_cache: Cache, kontext_sizes: None) -> None:
    """The part is put back, which diffusers leaves to the caller."""
    from diffusers.image_processor import VaeImageProcessor

    image, mask = picture(32, 32), hole(32, 32)
    call: dict[str, Any] = {"image": image, "guidance_scale": 2.5, "padding_mask_crop": 3}
    wanted = theirs(
        "kontext", "inpainting", folder("kontext"), seeds=[5], prompt=PROMPT, mask_image=mask, num_inference_steps=3,
        **call,
    )  # fmt: skip
    made = ours(folder("kontext"), session_cache, "inpainting")(PROMPT, mask=mask, steps=3, seed=5, **call)
    code = VaeImageProcessor()
    region = code.get_crop_region(mask, 32, 32, pad=3)
    assert region != (0, 0, 32, 32)
    agree(made, [code.apply_overlay(mask, image, part, region) for part in wanted])


def test_sizes_that_do_not_fit(folder: Folder, session_cache: Cache) -> None:
    """SD 3 refuses them, and FLUX rounds them down: as diffusers' pipelines do, and it is said."""
    with pytest.raises(ConfigError, match="`image` should have at least 1"):
        ours(folder("sd3"), session_cache, "image-to-image")(PROMPT, image=[])
    with pytest.raises(InputError, match="42 is not a multiple of 4"):
        ours(folder("sd3"), session_cache)(PROMPT, steps=1, width=42, height=16)
    pipe = ours(folder("flux"), session_cache)
    wanted = theirs(
        "flux", "text-to-image", folder("flux"), PROMPT, seeds=[1], num_inference_steps=2, width=42, height=18
    )
    made = pipe(PROMPT, steps=2, seed=1, width=42, height=18)
    agree(made, wanted)
    assert made.images[0].size == (40, 16)
    assert "width = 42 is made 40: this model takes multiples of 4" in made.warnings


def test_low_memory_previews_and_latents(folder: Folder, session_cache: Cache) -> None:
    seen: list[Any] = []
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 24, "height": 16}
    for family, low in (("sd3", False), ("flux", True)):
        pipe = ours(folder(family), session_cache, Use("text-to-image", low_memory=low))
        first = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
        assert first.latents.shape == (1, 16, 8, 12)
        assert {image.size for images in seen if images for image in images} == {(24, 16)}
        noise = BatchGenerator([1]).randn((1, 16, 8, 12))
        np.testing.assert_array_equal(pipe(PROMPT, **call, latents=noise).latents, first.latents)
        if low:
            assert all(model.model is None for _, model in pipe.compiled.all())


@pytest.mark.parametrize(
    ("family", "inputs", "message"),
    [
        ("flux", {"negative_prompt": "x"}, "Set true_cfg_scale above 1"),
        ("flux", {"true_cfg_scale": 2.0}, "no effect without a negative prompt"),
        ("flux", {"prompt_3": "x"}, "two text encoders"),
        ("flux", {"skip_guidance_layers": [0]}, "layers cannot be left out"),
        ("sd3", {"skip_guidance_layers": [3]}, "Give 0 to 2"),
        ("sd3", {"skip_guidance_layers": [0], "guidance_scale": 1.0}, "no effect without guidance"),
        ("sd3", {"true_cfg_scale": 2.0}, "Set guidance_scale"),
        ("sd3", {"guidance_scale": 1.0, "negative_prompt": "x"}, "no effect without guidance"),
        ("sd3", {"width": 4000, "height": 16}, "4000 is more than the 96 pixels a side that the model has places for"),
        ("flux", {"latents": np.zeros((1, 48, 64), np.float32)}, "Latents are not packed into tokens here."),
        ("flux", {"num_inference_steps": 4, "generator": 1}, "`generator` of diffusers is `seed` here"),
        ("flux", {"prompt_embeds": 1, "eta": 0}, "leave `prompt_embeds` of diffusers out"),
        ("flux", {"original_size": (64, 64)}, "original_size: no effect with this model, FLUX.1"),
        ("sd3", {"crop": (0, 8)}, "crop: no effect with this model"),
        ("sd3", {"negative_aesthetic_score": 1.0}, "It tells some models of Stable Diffusion XL"),
    ],
)
def test_bad_inputs_are_said(
    folder: Folder, session_cache: Cache, family: str, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, ConfigError)) as raised:
        ours(folder(family), session_cache)(PROMPT, steps=1, **inputs)
    assert message in str(raised.value)


def test_a_denoiser_of_one_kind_is_needed(folder: Folder, session_cache: Cache, tmp_path: Path) -> None:
    config = {"task": "text-to-image", "load": {"source": str(folder("sd3"))}}
    stages = [stage.stage for stage in ovforge.plan(config, cache=Cache(tmp_path / "empty")).stages]
    assert {"compile unet or transformer", "compile vae_decoder"} <= set(stages)
    with pytest.raises(ModelError, match="has none of unet, transformer"):
        ours(folder("sd3") / "vae", session_cache)


def test_weights_in_prompts_act_on_clip(folder: Folder, session_cache: Cache) -> None:
    """T5 reads the words without them, which is said."""
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 16, "height": 16}
    for family, differs in (("sd3", True), ("flux", False)):
        pipe = ours(folder(family), session_cache, Use("text-to-image", prompts="weighted"))
        plain, weighted = (pipe(text, **call) for text in ("a pink cat", "a (pink:1.6) cat"))
        assert (plain.latents != weighted.latents).any() == differs
        assert any("weights in prompts" in warning for warning in weighted.warnings)
