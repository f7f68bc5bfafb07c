"""What diffusers' pipelines do besides the model's files: overrides, the index, the tiny autoencoder."""

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
from families import agree
from ovforge import Use
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

F32 = Use("cpu", precision="f32")
FULL = {"weights": "f32"}
CALL: dict[str, Any] = {"guidance_scale": 2.0}
Folder = Callable[[str], Path]


def picture(width: int = 24, height: int = 16) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def hole() -> Image.Image:
    mask = np.zeros((16, 24), np.uint8)
    mask[4:8, 6:-6] = 255
    return Image.fromarray(mask)


def copied(source: Path, target: Path, scheduler: str, **config: Any) -> Path:
    """Copy a pipeline, with a scheduler's file of its own."""
    shutil.copytree(source, target)
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (target / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": scheduler, **base, **config}))
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
    return target


NAMES = {
    "text-to-image": "StableDiffusionPipeline",
    "image-to-image": "StableDiffusionImg2ImgPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
}
INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text-to-image": ({"width": 24, "height": 16}, {"width": 24, "height": 16}),
    "image-to-image": ({"image": picture(), "strength": 0.6}, {"image": picture(), "strength": 0.6}),
    "inpainting": (
        {"image": picture(), "mask": hole(), "strength": 0.6},
        {"image": picture(), "mask_image": hole(), "strength": 0.6, "width": 24, "height": 16},
    ),
}


def both(task: str, source: Path, cache: Cache, steps: int = 5, **options: Any) -> tuple[Any, list[Image.Image]]:
    """Return our result and diffusers' pictures of one call."""
    pipe = getattr(diffusers, NAMES[task]).from_pretrained(source)
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    mine, theirs = INPUTS[task]
    generator = torch.Generator().manual_seed(4)
    wanted = pipe("a pink cat", num_inference_steps=steps, generator=generator, **CALL, **theirs).images
    made = ovforge.Pipeline(Use(task, **options), source=source, load=FULL, device=F32, cache=cache)(
        "a pink cat", steps=steps, seed=4, **CALL, **mine
    )
    return made, wanted


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("task", "scheduler", "config"),
    [
        ("text-to-image", "DDIMScheduler", {"steps_offset": 0, "clip_sample": True}),
        ("text-to-image", "DDIMScheduler", {}),
        ("text-to-image", "PNDMScheduler", {}),
        ("text-to-image", "TCDScheduler", {}),
        ("image-to-image", "DDIMScheduler", {}),
        ("image-to-image", "LCMScheduler", {}),
        ("inpainting", "PNDMScheduler", {"skip_prk_steps": False}),
        ("inpainting", "DDIMScheduler", {"clip_sample": True}),
        ("inpainting", "LCMScheduler", {}),
    ],
)
def test_pictures_are_those_of_the_pipelines(
    torch_family: Folder, session_cache: Cache, tmp_path: Path, task: str, scheduler: str, config: dict[str, Any]
) -> None:
    source = copied(torch_family("sd1"), tmp_path / "model", scheduler, **config)
    agree(*both(task, source, session_cache), anywhere=3, average=0.5)


def test_the_file_as_it_stands(torch_family: Folder, session_cache: Cache, tmp_path: Path) -> None:
    """It gives another picture, and a plan says what is changed without it."""
    source = copied(torch_family("sd1"), tmp_path / "model", "DDIMScheduler", steps_offset=0, clip_sample=True)
    raw, wanted = both("text-to-image", source, session_cache, raw_scheduler=True)
    with pytest.raises(AssertionError):
        agree(raw, wanted, anywhere=3, average=0.5)
    config = {"task": "text-to-image", "load": {"source": str(source), **FULL}}
    [why] = [stage.why for stage in ovforge.plan(config, cache=session_cache).stages if stage.stage == "task"]
    assert "steps_offset = 1, clip_sample = false" in why
    config["task"] = {"use": "text-to-image", "raw_scheduler": True}
    [why] = [stage.why for stage in ovforge.plan(config, cache=session_cache).stages if stage.stage == "task"]
    assert not why


def test_the_index_names_the_scheduler(torch_family: Folder, session_cache: Cache, tmp_path: Path) -> None:
    source = copied(
        torch_family("sd1"), tmp_path / "model", "EulerDiscreteScheduler", steps_offset=1, timestep_spacing="leading"
    )
    path = source / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "DDIMScheduler"}))
    config = {"task": "text-to-image", "load": {"source": str(source), **FULL}}
    agree(*both("text-to-image", source, session_cache), anywhere=3, average=0.5)
    [why] = [stage.why for stage in ovforge.plan(config, cache=session_cache).stages if stage.stage == "task"]
    assert "model_index.json names EulerDiscreteScheduler" in why


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_tiny_autoencoder(torch_family: Folder, session_cache: Cache, tiny: Path) -> None:
    """As decoder and encoder, as decoder alone beside the model's own encoder, and for previews."""
    source, image = torch_family("sd1"), picture()
    small = diffusers.AutoencoderTiny.from_pretrained(tiny)

    def theirs(decoder_only: bool) -> list[Image.Image]:
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(source)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if not decoder_only:
            pipe.vae = small
        call = {
            "image": image,
            "strength": 0.6,
            "num_inference_steps": 4,
            "generator": torch.Generator().manual_seed(2),
        }
        latents = pipe("a cat", **CALL, **call, output_type="latent").images
        with torch.no_grad():
            return pipe.image_processor.postprocess(small.decode(latents).sample.detach())

    def ours(*roles: str, **call: Any) -> Any:
        load = {**FULL, "parts": dict.fromkeys(roles, str(tiny))}
        pipe = ovforge.Pipeline("image-to-image", source=source, load=load, device=F32, cache=session_cache)
        return pipe("a cat", image=image, strength=0.6, steps=4, seed=2, **CALL, **call)

    agree(ours("vae_decoder", "vae_encoder"), theirs(False))
    decoded = ours("vae_decoder")
    agree(decoded, theirs(True))
    previews: list[Any] = []
    kept = ours("preview_decoder", progress=lambda moment: previews.append(moment.preview and moment.preview()[0]))
    np.testing.assert_array_equal(np.asarray([p for p in previews if p][-1]), np.asarray(decoded.images[0]))
    assert np.asarray(kept.images[0]).tolist() != np.asarray(decoded.images[0]).tolist()
