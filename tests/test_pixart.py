"""PixArt-Sigma: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families import agree, maker, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "  A beautiful Pink unicorn, 8k "
LONG = "a cat in a hat on a mat, " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pipeline as it is published: its transformer has the name of an older class."""
    made: Path = maker("test_pixart").make_pixart_pipeline(
        tmp_path_factory.mktemp("pixart") / "pipeline", published=True
    )
    return made


def theirs(
    source: Path, *, steps: int, seeds: list[int], kind: str = "PixArtSigmaPipeline", **call: Any
) -> list[Image.Image]:
    made_with = {name: call.pop(name) for name in ("pag_applied_layers",) if name in call}
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(source / "transformer")
    pipe = getattr(diffusers, kind).from_pretrained(source, transformer=transformer, **made_with)
    pipe.set_progress_bar_config(disable=True)
    call = {"use_resolution_binning": False, "clean_caption": False, **call}
    made: list[Image.Image] = pipe(**call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_a_batch_with_a_long_prompt(folder: Path, session_cache: Cache, guidance: str) -> None:
    """In lower case, one prompt cut off, and with a negative one; what fills up is left out, as it is masked there."""
    call: dict[str, Any] = {"width": 40, "height": 24, "guidance_scale": 3.0, "max_sequence_length": 40}
    texts = {"negative_prompt": "Blue and green"}
    wanted = theirs(folder, prompt=[PROMPT, LONG], steps=4, seeds=[1, 2], **call, **texts)
    pipe = ours(folder, session_cache, Use("text-to-image", guidance=guidance))
    made = pipe([PROMPT, LONG], steps=4, seed=[1, 2], **call, **texts)
    agree(made, wanted)
    assert len([warning for warning in said_of_call(pipe, made) if "cut off" in warning]) == 1


def test_without_guidance_and_another_scheduler(folder: Path, session_cache: Cache) -> None:
    call: dict[str, Any] = {"width": 16, "height": 32, "guidance_scale": 1.0}
    wanted = theirs(folder, prompt=PROMPT, steps=3, seeds=[5], **call)
    agree(ours(folder, session_cache)(PROMPT, steps=3, seed=5, **call), wanted)
    made = ours(folder, session_cache, scheduler="euler")(PROMPT, steps=3, seed=5, **call)
    assert (np.asarray(made.images[0]) != np.asarray(wanted[0])).any()


@pytest.fixture(scope="module")
def alpha(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of PixArt-Alpha's pipeline."""
    return named(folder, tmp_path_factory.mktemp("alpha") / "pipeline", "PixArtAlphaPipeline")


def named(source: Path, target: Path, pipeline: str) -> Path:
    """Copy a model, under another pipeline."""
    shutil.copytree(source, target)
    index = target / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}))
    return target


@pytest.mark.parametrize("length", [None, 90])
def test_alpha_reads_fewer_tokens(alpha: Path, session_cache: Cache, length: int | None) -> None:
    call: dict[str, Any] = {"width": 16, "height": 32, "guidance_scale": 3.0}
    if length is not None:
        call["max_sequence_length"] = length
    kind = "PixArtAlphaPipeline"
    wanted = theirs(alpha, kind=kind, prompt=LONG, steps=3, seeds=[5], **call)
    made = ours(alpha, session_cache)(LONG, steps=3, seed=5, **call)
    agree(made, wanted)
    assert any(f"longer than the {length or 120} tokens" in warning for warning in made.warnings)


def test_perturbed_attention_is_said_to_be_missing(folder: Path, session_cache: Cache, tmp_path: Path) -> None:
    source = named(folder, tmp_path / "pag", "PixArtSigmaPAGPipeline")
    call: dict[str, Any] = {"width": 16, "height": 16, "guidance_scale": 3.0}
    pag = {"kind": "PixArtSigmaPAGPipeline", "pag_applied_layers": ["blocks.1"]}
    wanted = theirs(source, **pag, prompt=PROMPT, steps=2, seeds=[5], pag_scale=0.0, **call)
    made = ours(source, session_cache)(PROMPT, steps=2, seed=5, **call)
    agree(made, wanted)
    assert any("pictures are those of pag_scale = 0" in warning for warning in made.warnings)
    with pytest.raises(ConfigError, match="leave `pag_scale` of diffusers out"):
        ours(source, session_cache)(PROMPT, pag_scale=3.0)


def test_what_cannot_be_is_said(folder: Path, session_cache: Cache) -> None:
    with pytest.raises(InputError, match="42 is not a multiple of 4"):
        ours(folder, session_cache)(PROMPT, width=42, height=16, steps=1)
    with pytest.raises(ModelError, match="from text alone"):
        ours(folder, session_cache, "image-to-image")
    with pytest.raises(InputError, match="no list of sizes"):
        ours(folder, session_cache)(PROMPT, width=40, height=16, steps=1, resolution_binning=True)
