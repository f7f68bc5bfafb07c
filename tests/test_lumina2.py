"""Lumina-Image 2.0: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from families import agree, maker, original, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import InputError, ModelError
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "  A beautiful Pink unicorn, 8k "
LONG = "a cat in a hat on a mat, " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = maker("test_lumina2").make_lumina2_pipeline(tmp_path_factory.mktemp("lumina2") / "pipeline")
    return made


def theirs(source: Path, *, steps: int, seeds: list[int], **call: Any) -> list[Image.Image]:
    pipe = original("Lumina2Pipeline", source)
    pipe.vae_scale_factor = 2  # which the pipeline takes for 8, as of the published model
    made: list[Image.Image] = pipe(**call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_a_batch_with_a_long_prompt(folder: Path, session_cache: Cache, guidance: str) -> None:
    """One prompt is cut off; guided predictions keep the norm of those with the prompt."""
    call: dict[str, Any] = {"width": 40, "height": 24, "guidance_scale": 3.0, "max_sequence_length": 120}
    texts = {"negative_prompt": ["Blue and green", "red"]}
    wanted = theirs(folder, prompt=[PROMPT, LONG], steps=4, seeds=[1, 2], **call, **texts)
    pipe = ours(folder, session_cache, Use("text-to-image", guidance=guidance))
    made = pipe([PROMPT, LONG], steps=4, seed=[1, 2], **call, **texts)
    agree(made, wanted)
    assert len([warning for warning in said_of_call(pipe, made) if "cut off" in warning]) == 1


@pytest.mark.parametrize("system", ["", "Be short, and\nplain."])
def test_another_system_prompt(folder: Path, session_cache: Cache, system: str) -> None:
    """And guided predictions whose norm is let be."""
    call: dict[str, Any] = {"width": 16, "height": 32, "guidance_scale": 3.0, "cfg_normalization": False}
    wanted = theirs(folder, prompt=PROMPT, steps=3, seeds=[5], system_prompt=system, **call)
    pipe = ours(folder, session_cache)
    made = pipe(PROMPT, steps=3, seed=5, instruction=system, **call)
    agree(made, wanted)
    assert (pipe(PROMPT, steps=3, seed=5, **call).latents != made.latents).any()


@pytest.mark.parametrize(("steps", "ratio"), [(4, 0.6), (50, 0.58)])
def test_guidance_ends_where_it_does_in_diffusers(folder: Path, session_cache: Cache, steps: int, ratio: float) -> None:
    """Also where the part times the steps is a little less than a whole number, in binary: 0.58 of 50."""
    call: dict[str, Any] = {"width": 16, "height": 16, "guidance_scale": 3.0}
    wanted = theirs(folder, prompt=PROMPT, steps=steps, seeds=[5], cfg_trunc_ratio=ratio, **call)
    pipe = ours(folder, session_cache)
    made = pipe(PROMPT, steps=steps, seed=5, guidance_stop=ratio, **call)
    agree(made, wanted)
    guided = sum((number + 1) / steps <= ratio for number in range(steps))
    assert len(made.timings.spans["denoise.transformer"]) == steps + guided


def test_without_guidance(folder: Path, session_cache: Cache) -> None:
    call: dict[str, Any] = {"width": 16, "height": 32, "guidance_scale": 1.0}
    wanted = theirs(folder, prompt=PROMPT, steps=3, seeds=[5], **call)
    agree(ours(folder, session_cache)(PROMPT, steps=3, seed=5, **call), wanted)


def test_what_cannot_be_is_said(folder: Path, session_cache: Cache) -> None:
    pipe = ours(folder, session_cache)
    with pytest.raises(InputError, match="Give 299 at most"):
        pipe(PROMPT, width=16, height=16, steps=1, max_sequence_length=300)
    with pytest.raises(InputError, match="Give 256 at most"):
        pipe(PROMPT, width=264, height=16, steps=1)
    with pytest.raises(InputError, match="Give 1, its default, or 0"):
        pipe(PROMPT, width=16, height=16, steps=1, cfg_normalization=2)
    with pytest.raises(InputError, match="is for Z-Image"):
        pipe(PROMPT, width=16, height=16, steps=1, cfg_truncation=0.5)
    with pytest.raises(InputError, match="no list of sizes"):
        pipe(PROMPT, width=16, height=16, steps=1, resolution_binning=True)
    with pytest.raises(ModelError, match="from text alone"):
        ours(folder, session_cache, "inpainting")
