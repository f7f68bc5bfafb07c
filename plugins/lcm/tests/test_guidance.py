"""Guidance as an embedding, the model's defaults, and the recipe; whole pictures are in tests/test_text_to_image.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import ovforge_lcm
from ovforge import testing
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_lcm.guidance import GuidanceEmbedding, embedders, guidance_embedding


def bundle(width: Any = 256, own: bytes | None = None) -> ModelBundle:
    made = testing.small_bundle()
    made.configs["unet"] = {"time_cond_proj_dim": width}
    made.assets |= {"ovforge.json": own} if own else {}
    return made


def test_the_plugin_keeps_the_contract() -> None:
    testing.check_plugin(ovforge_lcm)
    testing.check_transform(ovforge_lcm, "guidance-embedding", {}, bundle)


@pytest.mark.parametrize("width", [4, 5, 24, 128, 257, 512])
def test_guidance_embedding_equals_diffusers(width: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    make = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for scale in (0.0, 1.0, 1.5, 3.0, 8.5):
        wanted = make(None, torch.tensor([scale - 1]), embedding_dim=width)[0].numpy()
        found = embedders(None, bundle(width))["timestep_cond"](scale)
        assert found.dtype == np.float32
        # Last-place differences of frequencies are multiplied by 1000 times the scale.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 + 3e-4 * abs(scale - 1))
        np.testing.assert_array_equal(found, guidance_embedding(scale, width=width))


def test_other_models_are_left_alone() -> None:
    made = bundle(None)
    assert "nothing to do" in GuidanceEmbedding().apply(made).notes[0]
    assert embedders(None, made) == {}
    assert "ovforge.json" not in made.assets


def test_what_a_model_says_of_its_defaults_stays() -> None:
    made = bundle(own=b'{"defaults": {"guidance_scale": 2.0}, "more": 1}')
    report = GuidanceEmbedding().apply(made)
    assert json.loads(made.assets["ovforge.json"]) == {"defaults": {"steps": 4, "guidance_scale": 2.0}, "more": 1}
    assert "guidance_scale = 2.0" in report.applied[0]


@pytest.mark.parametrize(
    ("width", "own", "message"),
    [("256", None, "'256' is not the width"), (2, None, "2 is not the width"), (256, b"{", "not valid JSON"),
     (256, b"[]", "expected"), (256, b'{"defaults": 3}', "expected")],
)  # fmt: skip
def test_what_cannot_be_is_said(width: Any, own: bytes | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GuidanceEmbedding().apply(bundle(width, own))
