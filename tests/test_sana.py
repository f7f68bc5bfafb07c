"""Sana: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families import agree, maker, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.model import BatchGenerator
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "  A beautiful Pink unicorn, 8k "
LONG = "a cat in a hat on a mat, " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("sana") / "pipeline")


@pytest.fixture(scope="module")
def sprint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("sprint") / "pipeline", sprint=True)


def made(folder: Path, **kind: bool) -> Path:
    small = maker("test_sana")
    path: Path = small.make_sana_pipeline(folder, **kind)
    return path


def theirs(
    source: Path, *, steps: int, seeds: list[int], scheduler: Any = None, kind: str = "SanaPipeline", **call: Any
) -> list[Image.Image]:
    pipe = getattr(diffusers, kind).from_pretrained(source)
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    call["use_resolution_binning"] = False
    # The autoencoder makes 2 pixels of a latent here, and the pipeline refuses what is not a multiple of 32.
    pipe.check_inputs = lambda *given, **named: None
    made: list[Image.Image] = pipe(**call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.parametrize(("width", "height", "guidance"), [(32, 32, 4.5), (42, 26, 1.0), (20, 52, 3.0)])
def test_text_to_image(folder: Path, session_cache: Cache, width: int, height: int, guidance: float) -> None:
    """The prompt is read in lower case, and without blanks around it."""
    call = {"width": width, "height": height, "guidance_scale": guidance}
    wanted = theirs(folder, prompt=PROMPT, steps=4, seeds=[3], **call)
    agree(ours(folder, session_cache)(PROMPT, steps=4, seed=3, **call), wanted)


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_a_batch_with_a_long_prompt(folder: Path, session_cache: Cache, guidance: str) -> None:
    """One prompt is cut off, and the other one filled up; there is a negative prompt, without the instruction."""
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0, "max_sequence_length": 80}
    texts = {"negative_prompt": "Blue and green"}
    wanted = theirs(folder, prompt=[PROMPT, LONG], steps=3, seeds=[1, 2], **call, **texts)
    pipe = ours(folder, session_cache, Use("text-to-image", guidance=guidance))
    made = pipe([PROMPT, LONG], steps=3, seed=[1, 2], **call, **texts)
    agree(made, wanted)
    assert len([warning for warning in said_of_call(pipe, made) if "cut off" in warning]) == 1
    assert (pipe([PROMPT, LONG], steps=3, seed=[1, 2], **call).latents != made.latents).any()


def test_another_scheduler(folder: Path, session_cache: Cache) -> None:
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0}
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    wanted = theirs(folder, prompt=PROMPT, steps=3, seeds=[1], scheduler=euler, **call)
    pipe = ours(folder, session_cache, scheduler=Use("flow-euler", shift=3.0))
    agree(pipe(PROMPT, steps=3, seed=1, **call), wanted)


@pytest.mark.parametrize(("size", "steps", "scale"), [((32, 32), 2, 4.5), ((42, 26), 1, 1.0), ((20, 52), 3, 6.0)])
def test_sprint(sprint: Path, session_cache: Cache, size: tuple[int, int], steps: int, scale: float) -> None:
    """A batch of two in a few steps, with guidance as an input."""
    call = {"width": size[0], "height": size[1], "guidance_scale": scale}
    angles = {} if steps == 2 else {"intermediate_timesteps": None}
    wanted = theirs(
        sprint, prompt=[PROMPT, LONG], steps=steps, seeds=[3, 4], kind="SanaSprintPipeline", **call, **angles
    )
    agree(ours(sprint, session_cache)([PROMPT, LONG], steps=steps, seed=[3, 4], **call), wanted)


def test_sprint_says_what_cannot_be(sprint: Path, session_cache: Cache) -> None:
    with pytest.raises(InputError, match="guidance built in"):
        ours(sprint, session_cache)(PROMPT, negative_prompt="x", steps=1)
    with pytest.raises(ConfigError, match="samples along angles"):
        ours(sprint, session_cache, scheduler=Use("flow-euler"))(PROMPT, width=16, height=16, steps=1)
    with pytest.raises(ModelError, match="Sana-Sprint makes pictures from text alone"):
        ours(sprint, session_cache, "image-to-image")


def test_low_memory_previews_and_latents(folder: Path, session_cache: Cache) -> None:
    seen: list[Any] = []
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 24, "height": 16}
    pipe = ours(folder, session_cache, Use("text-to-image", low_memory=True))
    first = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
    assert {image.size for images in seen if images for image in images} == {(24, 16)}
    noise = BatchGenerator([1]).randn((1, 4, 8, 12))
    np.testing.assert_array_equal(pipe(PROMPT, **call, latents=noise).latents, first.latents)


def test_what_cannot_be_is_said(folder: Path, session_cache: Cache) -> None:
    with pytest.raises(InputError, match="25 is not a multiple of 2"):
        ours(folder, session_cache)(PROMPT, width=25, steps=1)
    for task in ("image-to-image", "inpainting"):
        with pytest.raises(ModelError, match="from text alone"):
            ours(folder, session_cache, task)
