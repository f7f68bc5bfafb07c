"""Sana's transformer (Xie et al. 2024): linear attention, and a mask over the text that it reads."""

from __future__ import annotations

from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import Sizes, Submodel

__all__ = ["sana"]


def sana(module: Any, latent: Sizes) -> Submodel:
    """Describe SanaTransformer2DModel. `latent` has the sizes of the autoencoder's latents.

    Raises ModelError for embedded places, which diffusers computes for one size, and for Sana-Sprint.
    """
    config = module.config
    for name, what in (
        ("interpolation_scale", "it adds places to its tokens, which this loader does not convert"),
        ("guidance_embeds", "it is a Sana-Sprint, which this loader does not convert"),
    ):
        if getattr(config, name):
            raise ModelError(
                what,
                where=f"transformer/config.json: {name}",
                hint="Take a Sana for pictures of up to 2048 pixels that is not distilled.",
            )
    rows = latent.batch and 2 * latent.batch
    channels, width, patch = config.in_channels, config.caption_channels, config.patch_size
    run = type(module).forward

    def forward(
        hidden_states: Any, timestep: Any, encoder_hidden_states: Any, encoder_attention_mask: Any
    ) -> tuple[Any, ...]:
        result: tuple[Any, ...] = run(
            module,
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )
        return result

    example = (2, channels, latent.height or 4 * patch, latent.width or 3 * patch)
    return Submodel(
        forward,
        (
            Port("hidden_states", (rows, channels, latent.height, latent.width), example),
            Port("timestep", (rows,), (2,)),
            Port("encoder_hidden_states", (rows, None, width), (2, 7, width)),
            Port("encoder_attention_mask", (rows, None), (2, 7)),
        ),
        ("out_sample",),
    )
