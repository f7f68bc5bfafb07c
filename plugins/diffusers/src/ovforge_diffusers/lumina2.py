"""Lumina-Image 2.0's transformer (Qin et al. 2025) over a batch: diffusers' own lays out row after row in a loop.

A picture's tokens stand before the text's here, which changes nothing: what a token is to others depends on its place.
"""

from __future__ import annotations

from typing import Any

from ovforge_diffusers.ports import Sizes, Submodel
from ovforge_diffusers.rotation import rotated, rotation
from ovforge_diffusers.single_stream import single_stream

__all__ = ["lumina2"]

_THETA = 10000.0


def lumina2(module: Any, latent: Sizes) -> Submodel:
    """Describe Lumina2Transformer2DModel. `latent` has the sizes of the autoencoder's latents.

    Places are (text token, row, column); encoder_attention_mask has 0 for what fills up a text.
    """
    config = module.config
    patch = config.patch_size
    tokens = latent.height and latent.width and (latent.height // patch) * (latent.width // patch)
    module.rope_embedder = rotation(config.axes_dim_rope, _THETA)
    attentions = [block.attn for block in (*module.noise_refiner, *module.context_refiner, *module.layers)]
    example = (4 * patch, 3 * patch, 7, 12)
    return single_stream(module, _predict, attentions, _Attention(), len(config.axes_dim_rope), latent, tokens, example)


def _predict(module: Any, latents: Any, timestep: Any, states: Any, mask: Any, txt_ids: Any, img_ids: Any) -> Any:
    """Return what Lumina2Transformer2DModel gives for each row, [batch, channels, height, width]."""
    import torch

    patch = module.config.patch_size
    batch, channels, height, width = latents.shape
    high, wide = height // patch, width // patch
    time, text = module.time_caption_embed(latents, timestep, states)
    picture_turns, text_turns = module.rope_embedder(img_ids), module.rope_embedder(txt_ids)
    seen = mask > 0

    patches = latents.reshape(batch, channels, high, patch, wide, patch).permute(0, 2, 4, 3, 5, 1)
    picture = module.x_embedder(patches.reshape(batch, high * wide, patch * patch * channels))
    for layer in module.context_refiner:
        text = layer(text, seen, text_turns)
    for layer in module.noise_refiner:
        picture = layer(picture, None, picture_turns, time)

    both = torch.cat([picture, text], dim=1)
    turns = tuple(torch.cat(pair, dim=1) for pair in zip(picture_turns, text_turns, strict=True))
    seen = torch.cat([torch.ones_like(img_ids[..., 0], dtype=torch.bool), seen], dim=1)
    for layer in module.layers:
        both = layer(both, seen, turns, time)
    made = module.norm_out(both[:, : high * wide], time)
    made = made.reshape(batch, high, wide, patch, patch, module.out_channels)
    return made.permute(0, 5, 1, 3, 2, 4).reshape(batch, module.out_channels, height, width)


class _Attention:
    """What stands in for Lumina2AttnProcessor2_0, whose rotation is a product of complex numbers.

    Several heads of queries share one of keys.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        base_sequence_length: Any = None,
    ) -> Any:
        import torch

        channels = attn.to_q.out_features // attn.heads
        query, key, value = (
            layer(hidden_states).unflatten(-1, (layer.out_features // channels, channels))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = rotated(attn.norm_q(query), *image_rotary_emb), rotated(attn.norm_k(key), *image_rotary_emb)
        shared = query.shape[2] // key.shape[2]
        key, value = (each.unsqueeze(3).repeat(1, 1, 1, shared, 1).flatten(2, 3) for each in (key, value))
        seen = None if attention_mask is None else attention_mask[:, None, None, :]
        made = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen, scale=attn.scale
        )
        return attn.to_out[0](made.transpose(1, 2).flatten(2, 3))
