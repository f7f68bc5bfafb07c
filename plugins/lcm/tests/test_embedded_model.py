"""The model that ships: its size, its files, and its pictures against diffusers on torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ovforge
import ovforge_lcm

MODEL = Path(ovforge_lcm.__file__).parent / "model"
WEIGHTS = Path(__file__).parent / "data" / "embedded-diffusers"
LIMIT = 25_000_000


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_is_small_and_brings_its_card_and_notice() -> None:
    assert size(MODEL) <= LIMIT
    assert size(WEIGHTS) <= LIMIT
    assert {"README.md", "NOTICE", "model_index.json"} <= {path.name for path in MODEL.iterdir()}


def test_it_proposes_its_own_defaults() -> None:
    defaults = json.loads((MODEL / "ovforge.json").read_text())["defaults"]
    result = ovforge.Pipeline("text-to-image", source=ovforge_lcm.EMBEDDED_MODEL)("a cat", seed=1)
    assert result.provenance["inputs"]["steps"] == defaults["steps"]
    assert result.provenance["inputs"]["guidance_scale"] == defaults["guidance_scale"]
    assert result.images[0].size == (128, 128)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (160, 104)])
def test_pictures_equal_diffusers(width: int, height: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.LatentConsistencyModelPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    device = ovforge.Use("cpu", precision="f32")
    pipeline = ovforge.Pipeline("text-to-image", source=ovforge_lcm.EMBEDDED_MODEL, device=device)
    for prompt, seed in (("a beautiful pink unicorn, 8k", 1234567), ("a red car on a blue background", 7)):
        options = {"width": width, "height": height, "guidance_scale": 3.0}
        generator = torch.Generator().manual_seed(seed)
        theirs = reference(prompt, num_inference_steps=4, generator=generator, **options).images[0]
        ours = pipeline(prompt, steps=4, seed=seed, **options).images[0]
        difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16))
        assert difference.max() <= 2
        assert difference.mean() <= 0.2
