"""Stable Diffusion 1.x (Rombach et al. 2022) and latent consistency models on OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.extensions import TaskExtension


@hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    """Text to image."""
    yield TaskExtension(
        name="text-to-image",
        summary="Make pictures from a prompt",
        config="ovforge_stable_diffusion.inputs:TextToImageOptions",
        inputs="ovforge_stable_diffusion.inputs:TextToImageInputs",
        factory="ovforge_stable_diffusion.task:TextToImage",
        roles=("tokenizer", "text_encoder", "unet", "vae_decoder"),
    )
