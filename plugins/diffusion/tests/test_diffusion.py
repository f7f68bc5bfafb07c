"""The plugin's contract and its parts; whole pictures against diffusers are in tests/test_text_to_image.py."""

from __future__ import annotations

import pytest

import ovforge_diffusion
from ovforge import testing
from ovforge.config.options import checked
from ovforge.errors import ConfigError
from ovforge_diffusion.inputs import TextToImageInputs


def test_the_plugin_keeps_the_contract() -> None:
    testing.check_plugin(ovforge_diffusion)
    testing.check_task(ovforge_diffusion, "text-to-image")


def test_inputs_are_checked() -> None:
    with pytest.raises(ConfigError, match="`width`"):
        checked(TextToImageInputs, {"prompt": "x", "width": 100_000}, where="input")
    with pytest.raises(ConfigError, match="the key `prompt` is missing"):
        checked(TextToImageInputs, {}, where="input")
