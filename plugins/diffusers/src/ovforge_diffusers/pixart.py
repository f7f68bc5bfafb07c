"""PixArt's transformer (Chen et al. 2023, 2024): places from sines, and a mask over the text that it reads."""

from __future__ import annotations

from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import Sizes, Submodel

__all__ = ["pixart"]


def pixart(module: Any, latent: Sizes) -> Submodel:
    """Describe PixArtTransformer2DModel. `latent` has the sizes of the autoencoder's latents.

    Raises ModelError for a model that is told the size of the picture, as PixArt-Alpha for 1024 pixels is.
    """
    config = module.config
    if module.use_additional_conditions:
        raise ModelError(
            "it takes the size of the picture as a condition, which this loader does not convert",
            where="transformer/config.json: use_additional_conditions",
            hint="Take a PixArt-Sigma, which has none.",
        )
    rows = latent.batch and 2 * latent.batch
    channels, patch = config.in_channels, config.patch_size
    width = config.caption_channels or config.cross_attention_dim
    run = type(module).forward
    module.pos_embed = _patches(module.pos_embed)

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


def _patches(own: Any) -> Any:
    """Return a module in place of PatchEmbed that computes places for any size, and keeps its names of weights."""
    import torch

    channels = own.proj.out_channels
    steps = torch.arange(channels // 4, dtype=torch.float64) / (channels / 4)

    class Patches(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.proj = own.proj
            self.register_buffer("frequencies", (1.0 / 10000**steps).float(), persistent=False)

        def forward(self, latents: Any) -> Any:
            tokens = self.proj(latents)
            high, wide = tokens.shape[2], tokens.shape[3]
            columns, rows = (
                torch.arange(side).float() * own.base_size / side / own.interpolation_scale for side in (wide, high)
            )
            across, down = self._waves(columns), self._waves(rows)
            places = torch.cat([across[None].expand(high, -1, -1), down[:, None].expand(-1, wide, -1)], dim=-1).reshape(
                1, high * wide, channels
            )
            return tokens.flatten(2).transpose(1, 2) + places

        def _waves(self, places: Any) -> Any:
            angles = places[:, None] * self.frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

    return Patches()
