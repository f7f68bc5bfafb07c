"""The plugin's contract and its parts; whole pictures against diffusers are in tests/test_text_to_image.py."""

from __future__ import annotations

import numpy as np
import pytest

import ovforge_stable_diffusion
from ovforge import testing
from ovforge.config.options import checked
from ovforge.errors import ConfigError
from ovforge_stable_diffusion.inputs import TextToImageInputs
from ovforge_stable_diffusion.unet import guidance_embedding


def test_the_plugin_keeps_the_contract() -> None:
    testing.check_plugin(ovforge_stable_diffusion)
    testing.check_task(ovforge_stable_diffusion, "text-to-image")


@pytest.mark.parametrize("width", [4, 5, 24, 128, 257, 512])
def test_guidance_embedding_equals_diffusers(width: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    make = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for scale in (0.0, 1.0, 1.5, 3.0, 8.5):
        wanted = make(None, torch.tensor([scale - 1]), embedding_dim=width)[0].numpy()
        # Last-place differences of frequencies are multiplied by 1000 times the scale.
        np.testing.assert_allclose(guidance_embedding(scale, width), wanted, rtol=0, atol=1e-6 + 3e-4 * abs(scale - 1))


def test_inputs_are_checked() -> None:
    with pytest.raises(ConfigError, match="`width`"):
        checked(TextToImageInputs, {"prompt": "x", "width": 100_000}, where="input")
    with pytest.raises(ConfigError, match="the key `prompt` is missing"):
        checked(TextToImageInputs, {}, where="input")
