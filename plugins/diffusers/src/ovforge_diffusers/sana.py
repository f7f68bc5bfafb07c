"""Sana's transformer (Xie et al. 2024): linear attention, and a mask over the text that it reads."""

from __future__ import annotations

from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import Sizes, Submodel

__all__ = ["sana"]


def sana(module: Any, latent: Sizes) -> Submodel:
    """Describe SanaTransformer2DModel. `latent` has the sizes of the autoencoder's latents.

    Raises ModelError for embedded places, which diffusers computes for one size.
    """
    config = module.config
    if config.interpolation_scale:
        raise ModelError(
            "it adds places to its tokens, which this loader does not convert",
            where="transformer/config.json: interpolation_scale",
            hint="Take a Sana for pictures of up to 2048 pixels.",
        )
    rows = latent.batch if config.guidance_embeds else latent.batch and 2 * latent.batch
    channels, width, patch = config.in_channels, config.caption_channels, config.patch_size
    run = type(module).forward

    def forward(
        hidden_states: Any, timestep: Any, encoder_hidden_states: Any, encoder_attention_mask: Any, guidance: Any = None
    ) -> tuple[Any, ...]:
        result: tuple[Any, ...] = run(
            module,
            hidden_states,
            encoder_hidden_states,
            timestep,
            guidance,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )
        return result

    example = (2, channels, latent.height or 4 * patch, latent.width or 3 * patch)
    inputs = [
        Port("hidden_states", (rows, channels, latent.height, latent.width), example),
        Port("timestep", (rows,), (2,)),
        Port("encoder_hidden_states", (rows, None, width), (2, 7, width)),
        Port("encoder_attention_mask", (rows, None), (2, 7)),
    ]
    if config.guidance_embeds:
        inputs.append(Port("guidance", (rows,), (2,)))
    return Submodel(forward, tuple(inputs), ("out_sample",))
