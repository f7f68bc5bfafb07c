"""Architectures without models: what is recognised and refused, how latents are packed, which halves a step needs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovforge.contracts import TaskContext
from ovforge.errors import ModelError
from ovforge_diffusion.architectures import architecture_of
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.guidance import Guidance, SkipLayers
from ovforge_diffusion.residuals import block_residuals, residual_shapes
from ovforge_diffusion.scale import Scale

VAE = {"latent_channels": 16, "block_out_channels": (8, 16, 16, 16), "scaling_factor": 1.5305, "shift_factor": 0.0609}


class Bundle:
    """The configs of a model, and no model."""

    def __init__(self, configs: dict[str, dict[str, Any]], index: dict[str, Any]) -> None:
        self.configs, self.index, self.assets = {"vae_decoder": VAE, **configs}, index, {}
        self.roles = {*self.configs, "text_encoder", "text_encoder_2"}

    def __contains__(self, role: object) -> bool:
        return role in self.roles

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.roles))

    def scheduler_config(self) -> dict[str, Any]:
        return {}


def opened(
    config: dict[str, Any], task: Any = "text-to-image", role: str = "transformer", **index: Any
) -> Architecture:
    bundle: Any = Bundle({role: config}, index)
    return architecture_of(TaskContext(bundle=bundle, scheduler=lambda: None), task)  # type: ignore[arg-type]


FLUX = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "guidance_embeds": True}
QWEN = {"_class_name": "QwenImageTransformer2DModel", "in_channels": 64}
SD3 = {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "patch_size": 2}


def test_a_model_is_known_by_its_configs() -> None:
    assert [opened(config).name for config in (FLUX, SD3)] == ["FLUX.1", "Stable Diffusion 3 and 3.5"]
    assert opened({**FLUX, "in_channels": 384}, "inpainting").masked
    assert opened(SD3).decoding.shift == 0.0609
    assert opened(QWEN, _class_name="QwenImageInpaintPipeline").name == "Qwen-Image"
    with pytest.raises(ModelError, match="Qwen-Image-Edit shows pictures to it"):
        opened(QWEN, "image-to-image", _class_name="QwenImageEditPlusPipeline")
    assert opened(SD3, "inpainting").decoding.shift == 0, "diffusers' pipeline for inpainting leaves the shift out"
    defaults = [opened(FLUX, "image-to-image").defaults, opened({**FLUX, "in_channels": 384}, "inpainting").defaults]
    assert [(each.steps, each.guidance_scale, each.strength) for each in defaults] == [(28, 7.0, 0.6), (50, 30.0, 1.0)]


@pytest.mark.parametrize(
    ("config", "index", "message"),
    [
        ({"_class_name": "OtherModel"}, {}, "'OtherModel' is not one that this task knows"),
        ({}, {}, "None is not one that this task knows"),
        ({**FLUX, "in_channels": 160}, {}, "160 input channels"),
        ({**SD3, "in_channels": 17}, {}, "17 input channels"),
        ({**QWEN, "in_channels": 16}, {}, "16 input channels"),
        ({**FLUX, "in_channels": "many"}, {}, "cannot be used"),
    ],
)
def test_what_cannot_run_is_said(config: dict[str, Any], index: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        opened(config, **index)


def test_a_text_encoder_of_too_few_layers_is_said() -> None:
    vae = {"latent_channels": 2, "bn_running_mean_data": [0.0] * 8, "bn_running_var_data": [1.0] * 8}
    transformer = {"_class_name": "Flux2Transformer2DModel", "in_channels": 8}

    def flux2(layers: int) -> Architecture:
        configs: dict[str, Any] = {"transformer": transformer, "vae_decoder": vae}
        bundle: Any = Bundle({**configs, "text_encoder": {"num_hidden_layers": layers}}, {})
        return architecture_of(TaskContext(bundle=bundle, scheduler=lambda: None), "text-to-image")  # type: ignore[arg-type]

    assert flux2(28).name == "FLUX.2 klein"
    with pytest.raises(
        ModelError, match="text_encoder: has 2 layers, and FLUX.2 klein takes the states after layers 9, 18 and 27"
    ):
        flux2(2)


@settings(max_examples=30)
@given(pictures=st.integers(1, 3), height=st.integers(1, 6), width=st.integers(1, 6))
def test_packed_latents_are_tokens_of_two_by_two(pictures: int, height: int, width: int) -> None:
    flux = opened(FLUX)
    latents = np.random.default_rng(0).standard_normal((pictures, 16, 2 * height, 2 * width)).astype(np.float32)
    packed = flux.pack(latents)
    assert packed.shape == flux.packed_shape(pictures, 2 * height, 2 * width) == (pictures, height * width, 64)
    np.testing.assert_array_equal(flux.unpack(packed, 2 * height, 2 * width), latents)
    np.testing.assert_array_equal(packed[:, -1].reshape(pictures, 16, 2, 2), latents[:, :, -2:, -2:])


def test_guided_predictions_that_keep_their_norms() -> None:
    """For each token, as diffusers' QwenImagePipeline computes it; a prediction of zeros stays one."""
    rng = np.random.default_rng(1)
    without, along = (rng.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2))
    without[0, 0] = along[0, 0] = 0
    made = Guidance(2, 4.0, np.ones((1, 2), np.float32), keeps_norm=True).combine({0: without, 1: along})
    guided = without + 4 * (along - without)
    wanted, found = (np.linalg.norm(each, axis=2, keepdims=True) for each in (along, guided))
    np.testing.assert_allclose(made, guided * wanted / np.maximum(found, 1e-9), rtol=1e-5, atol=1e-6)


def test_skipped_layers_count_in_a_part_of_the_steps() -> None:
    """Strictly between the two, as in diffusers."""
    skip = SkipLayers(2.0, 0.1, 0.5, steps=10)
    guidance = Guidance(3, 4.0, np.ones((1, 1), np.float32), skip=skip)
    assert [number for number in range(10) if 2 in guidance.active(number, 10)] == [2, 3, 4]
    halves = {number: np.full((1, 2), value, np.float32) for number, value in enumerate((1.0, 3.0, 2.5))}
    np.testing.assert_allclose(guidance.combine(halves), 1 + 4 * 2 + (3 - 2.5) * 2)
    np.testing.assert_allclose(guidance.combine({0: halves[0], 1: halves[1]}), 1 + 4 * 2)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor = 0 is not a number above 0"),
        ({"scaling_factor": "x"}, "scaling_factor = 'x' is not a number above 0"),
        ({"scaling_factor": 10**400}, "is not a number above 0"),
        ({"shift_factor": math.nan}, "shift_factor = nan is not a number"),
        ({"latents_std": [1.0, 0.0]}, "latents_std = 0.0 is not a number above 0"),
        ({"bn_running_mean_data": [0.0], "bn_running_var_data": [-1.0]}, "bn_running_var_data = -1.0 is not"),
    ],
)
def test_a_scale_of_latents_that_is_none(vae: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        Scale.of({**VAE, **vae})


def test_configs_with_absurd_numbers_of_layers() -> None:
    """They are refused before anything is counted up to them."""
    net = {"_class_name": "SD3ControlNetModel", "num_layers": 2}
    assert len(block_residuals(net, {**SD3, "num_layers": 4})) == 3
    for layers in (10**12, -1, "four"):
        with pytest.raises(ModelError, match="num_layers = .*is counted in blocks"):
            block_residuals(net, {**SD3, "num_layers": layers})
        with pytest.raises(ModelError, match="layers_per_block = .* are not numbers of layers"):
            residual_shapes({"block_out_channels": [8, 8], "layers_per_block": layers}, (1, 4, 8, 8))
