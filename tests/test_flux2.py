"""FLUX.2 klein: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from PIL import Image

import ovforge
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
Folder = Callable[[bool], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function that gives the folder of the model, distilled or not, made once."""
    small = maker("test_flux2")
    made: Path = small.make_flux2_pipeline(tmp_path_factory.mktemp("flux2") / "pipeline")
    distilled = Path(shutil.copytree(made, made.with_name("distilled")))
    index = distilled / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    return lambda fast: distilled if fast else made


def theirs(source: Path, *, steps: int, seeds: list[int], **call: Any) -> list[Image.Image]:
    kind = "Flux2KleinInpaintPipeline" if "mask_image" in call else "Flux2KleinPipeline"
    made: list[Image.Image] = original(kind, source)(**call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def hole(width: int, height: int) -> Image.Image:
    """Return a mask whose edges lie inside of tokens."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 + 1 : height // 2 + 4, 5 : width // 2 + 3] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize(
    ("width", "height", "guidance", "distilled"),
    [(32, 32, 4.0, False), (42, 26, 1.0, False), (20, 52, 3.0, True)],
)
def test_text_to_image(
    folder: Folder, session_cache: Cache, width: int, height: int, guidance: float, distilled: bool
) -> None:
    call: dict[str, Any] = {"width": width, "height": height, "guidance_scale": guidance}
    wanted = theirs(folder(distilled), prompt=PROMPT, steps=4, seeds=[3], **call)
    made = ours(folder(distilled), session_cache)(PROMPT, steps=4, seed=3, **call)
    agree(made, wanted)
    assert any("distilled" in warning for warning in made.warnings) == distilled
    call |= {"sigmas": [1.0, 0.7, 0.2]}  # whose number counts for the shift
    wanted = theirs(folder(distilled), prompt=PROMPT, steps=3, seeds=[3], **call)
    agree(ours(folder(distilled), session_cache)(PROMPT, seed=3, **call), wanted)


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_a_batch_with_a_long_prompt(folder: Folder, session_cache: Cache, guidance: str) -> None:
    """One prompt is cut off, and the other one filled up."""
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0, "max_sequence_length": 80}
    wanted = theirs(folder(False), prompt=[PROMPT, LONG], steps=3, seeds=[1, 2], **call)
    pipe = ours(folder(False), session_cache, Use("text-to-image", guidance=guidance))
    made = pipe([PROMPT, LONG], steps=3, seed=[1, 2], **call)
    agree(made, wanted)
    assert len([warning for warning in said_of_call(pipe, made) if "cut off" in warning]) == 1
    assert (pipe(PROMPT, negative_prompt="blue", steps=3, seed=1, **call).latents != made.latents[:1]).any()


@pytest.mark.parametrize("images", [[(70, 66)], [(64, 90), (131, 70)]])
def test_pictures_that_it_sees(folder: Folder, session_cache: Cache, images: list[tuple[int, int]]) -> None:
    """One gives its size; several are cut in the middle, and each has a size of its own."""
    given = [picture(*size, seed) for seed, size in enumerate(images)]
    size: dict[str, Any] = {} if len(images) == 1 else {"width": 40, "height": 24}
    call = {"guidance_scale": 2.0, **size}
    wanted = theirs(folder(False), image=list(given), prompt=[PROMPT, LONG], steps=2, seeds=[5, 6], **call)
    pipe = ours(folder(False), session_cache, "image-to-image")
    agree(pipe([PROMPT, LONG], image=given, steps=2, seed=[5, 6], **call), wanted)


@pytest.mark.parametrize(("strength", "width", "height"), [(0.55, 40, 24), (1.0, 30, 45)])
def test_inpainting(folder: Folder, session_cache: Cache, strength: float, width: int, height: int) -> None:
    """It sees the picture, too. The edges of the mask are soft, since diffusers resizes it to tokens."""
    image, mask = picture(width, height), hole(width, height)
    call: dict[str, Any] = {"image": image, "strength": strength, "guidance_scale": 3.0}
    wanted = theirs(folder(False), prompt=[PROMPT, LONG], mask_image=mask, steps=4, seeds=[5, 6], **call)
    pipe = ours(folder(False), session_cache, "inpainting")
    made = pipe([PROMPT, LONG], mask=mask, steps=4, seed=[5, 6], **call)
    agree(made, wanted)
    other = picture(72, 64, seed=2)
    wanted = theirs(folder(False), prompt=PROMPT, mask_image=mask, image_reference=other, steps=3, seeds=[5], **call)
    agree(pipe(PROMPT, mask=mask, reference=other, steps=3, seed=5, **call), wanted)
    pasted = np.asarray(pipe(PROMPT, mask=mask, steps=2, seed=5, paste=True, **call).images[0])
    size = pasted.shape[1], pasted.shape[0]
    stays = np.asarray(mask.resize(size, Image.Resampling.LANCZOS)) < 127.5
    original = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(pasted[stays], original[stays])


def test_inpainting_in_a_part(folder: Folder, session_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is scaled back to where it was cut out. diffusers would put the middle of what it made there."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    monkeypatch.setattr(Flux2ImageProcessor, "_resize_and_crop", VaeImageProcessor._resize_and_crop)
    image, mask = picture(72, 64), hole(72, 64)
    call: dict[str, Any] = {"image": image, "strength": 0.7, "guidance_scale": 3.0, "padding_mask_crop": 6}
    wanted = theirs(folder(False), prompt=PROMPT, mask_image=mask, steps=4, seeds=[5], **call)
    pipe = ours(folder(False), session_cache, "inpainting")
    made = pipe(PROMPT, mask=mask, steps=4, seed=5, **call)
    agree(made, wanted)
    small = pipe(PROMPT, mask=mask, steps=4, seed=5, **call, width=40, height=40)
    assert small.latents.shape[2:] == (10, 10)
    assert small.images[0].size == (72, 64), "the whole picture, with the part in it"
    stays = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(small.images[0])[stays], np.asarray(image)[stays])


def test_a_large_picture_is_scaled_to_a_megapixel(
    folder: Folder, session_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    from ovforge_diffusion.architectures import flux2

    pipe = ours(folder(True), session_cache, "image-to-image")
    large = picture(1500, 1001)
    expected = Flux2ImageProcessor._resize_to_target_area(large)
    seen = pipe.task.architecture.shown(large)
    assert seen.size == (1252, 836)
    left, top = ((whole - kept) // 2 for whole, kept in zip(expected.size, seen.size, strict=True))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(expected)[top : top + 836, left : left + 1252])
    np.testing.assert_array_equal(np.asarray(pipe.task.architecture.limited(large)), np.asarray(expected))
    for size in ((63, 100), (64, 600)):
        with pytest.raises(InputError, match="Give pictures of 64 pixels a side or more"):
            pipe.task.architecture.shown(picture(*size))
    with pytest.raises(InputError, match="11 pictures, and FLUX.2 klein sees 10 at most"):
        pipe(PROMPT, image=[picture(64, 64)] * 11, steps=1)
    assert flux2._shift(5000, 4) == pytest.approx(0.00016927 * 5000 + 0.45666666)


def test_low_memory_previews_and_latents(folder: Folder, session_cache: Cache) -> None:
    seen: list[Any] = []
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 24, "height": 16}
    pipe = ours(folder(True), session_cache, Use("text-to-image", low_memory=True))
    first = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
    assert {image.size for images in seen if images for image in images} == {(24, 16)}
    noise = BatchGenerator([1]).randn((1, 16, 4, 6))
    np.testing.assert_array_equal(pipe(PROMPT, **call, latents=noise).latents, first.latents)
    tiled = ours(folder(True), session_cache, Use("text-to-image", tile=64))(
        PROMPT, steps=1, seed=1, width=96, height=64
    )
    assert tiled.images[0].size == (96, 64)


def test_what_cannot_be_is_said(folder: Folder, session_cache: Cache) -> None:
    with pytest.raises(InputError, match="guidance built in"):
        ours(folder(True), session_cache)(PROMPT, negative_prompt="x", steps=1)
    pipe = ours(folder(True), session_cache, "inpainting")
    with pytest.raises(InputError, match="is 24x16, and the picture is 16x24"):
        pipe(PROMPT, image=picture(16, 24), mask=hole(24, 16), steps=1)


def test_an_export_of_optimum_gives_the_same_picture(folder: Folder, session_cache: Cache, tmp_path: Path) -> None:
    """optimum-intel 2.2 names the states of each layer by the number of the one before it, and tells the statistics of
    latents to the decoder alone."""
    ovforge.open_model(folder(False), cache=session_cache, options={"weights": "f32"}).save(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "optimum")
    config = tmp_path / "optimum" / "vae_encoder" / "config.json"
    told = json.loads(config.read_text())
    assert told["bn_running_var_data"]
    config.write_text(json.dumps({name: value for name, value in told.items() if not name.startswith("bn_")}))
    encoder = tmp_path / "ours" / "text_encoder" / "openvino_model.xml"
    model = ovforge.model.core().read_model(encoder)
    count = json.loads(encoder.with_name("config.json").read_text())["num_hidden_layers"]
    names = [f"hidden_states.{layer}" for layer in range(count + 1)]
    sources = [model.output(name).get_node().input_value(0) for name in names]
    results = [ops.result(source) for source in sources]
    early = ov.Model(results, model.get_parameters())
    for port, name in zip(early.outputs, ["last_hidden_state", *names[:-1]], strict=True):
        port.get_tensor().set_names({name})
    ov.save_model(early, tmp_path / "optimum" / "text_encoder" / "openvino_model.xml", compress_to_fp16=False)
    device, call = Use("cpu", precision="f32"), {"width": 32, "height": 32, "guidance_scale": 1.0}
    made = [
        ovforge.Pipeline("text-to-image", source=tmp_path / name, device=device, cache=session_cache)(
            PROMPT, steps=2, seed=3, **call
        )
        for name in ("ours", "optimum")
    ]
    assert np.array_equal(made[0].latents, made[1].latents)
    made = [
        ovforge.Pipeline("image-to-image", source=tmp_path / name, device=device, cache=session_cache)(
            PROMPT, image=picture(64, 64), steps=2, seed=3, **call
        )
        for name in ("ours", "optimum")
    ]
    assert np.array_equal(made[0].latents, made[1].latents)
