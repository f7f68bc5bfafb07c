"""Z-Image's transformer (Tongyi-MAI 2025) over a batch: diffusers' own takes lists of tensors, one after the other.

Rotary position embeddings are computed in reals, in the form that the runtime fuses.
"""

from __future__ import annotations

from typing import Any

from ovforge.errors import ModelError
from ovforge_diffusers.ports import Sizes, Submodel
from ovforge_diffusers.rotation import rotated, rotation
from ovforge_diffusers.single_stream import single_stream

__all__ = ["MULTIPLE", "zimage"]

MULTIPLE = 32
"""Tokens of a picture, and of a text, are filled up to a multiple of it by learned ones."""

_PATCH, _KEY = 2, "2-1"
"""Latents a side that are one token, of one frame: what diffusers' pipelines call the transformer with."""


def zimage(module: Any, latent: Sizes) -> Submodel:
    """Describe ZImageTransformer2DModel. `latent` has the sizes of the autoencoder's latents.

    What fills up a text, and the batch, has a negative encoder_attention_mask. Places are (text token from 1 on, row,
    column), and 0 for what fills up the batch, which nothing sees. Raises ModelError for patches of another size.
    """
    config = module.config
    if _KEY not in module.all_x_embedder:
        raise ModelError(
            f"its patches have the sides {list(config.all_patch_size)}, and {_PATCH} is needed",
            where="transformer/config.json: all_patch_size",
            hint="diffusers' pipelines for Z-Image take no other patches either.",
        )
    tokens = latent.height and latent.width and (latent.height // _PATCH) * (latent.width // _PATCH)
    filled = tokens and tokens + -tokens % MULTIPLE
    module.rope_embedder = rotation(config.axes_dims, config.rope_theta)
    attentions = [block.attention for block in (*module.noise_refiner, *module.context_refiner, *module.layers)]
    example = (6, 4, MULTIPLE, MULTIPLE)
    return single_stream(module, _predict, attentions, _Attention(), len(config.axes_dims), latent, filled, example)


def _predict(module: Any, latents: Any, timestep: Any, states: Any, mask: Any, txt_ids: Any, img_ids: Any) -> Any:
    """Return what ZImageTransformer2DModel gives for each row, [batch, channels, height, width]."""
    import torch

    batch, channels, height, width = latents.shape
    high, wide = height // _PATCH, width // _PATCH
    time = module.t_embedder(timestep * module.t_scale)
    picture_turns, text_turns = module.rope_embedder(img_ids), module.rope_embedder(txt_ids)

    patches = latents.reshape(batch, channels, high, _PATCH, wide, _PATCH).permute(0, 2, 4, 3, 5, 1)
    picture = module.all_x_embedder[_KEY](patches.reshape(batch, high * wide, _PATCH * _PATCH * channels))
    fill = module.x_pad_token.unsqueeze(0).expand(batch, img_ids.shape[1] - high * wide, -1)
    picture = torch.cat([picture, fill], dim=1)
    for layer in module.noise_refiner:
        picture = layer(picture, None, picture_turns, time)

    text = torch.where((mask >= 0).unsqueeze(-1), module.cap_embedder(states), module.cap_pad_token)
    seen = txt_ids[..., 0] > 0
    for layer in module.context_refiner:
        text = layer(text, seen, text_turns)

    both = torch.cat([picture, text], dim=1)
    turns = tuple(torch.cat(pair, dim=1) for pair in zip(picture_turns, text_turns, strict=True))
    seen = torch.cat([img_ids[..., 0] >= 0, seen], dim=1)
    for layer in module.layers:
        both = layer(both, seen, turns, time)
    made = module.all_final_layer[_KEY](both[:, : high * wide], c=time)
    made = made.reshape(batch, high, wide, _PATCH, _PATCH, module.out_channels)
    return made.permute(0, 5, 1, 3, 2, 4).reshape(batch, module.out_channels, height, width)


class _Attention:
    """What stands in for ZSingleStreamAttnProcessor, whose rotation is a product of complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        freqs_cis: Any = None,
    ) -> Any:
        import torch

        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = rotated(query if attn.norm_q is None else attn.norm_q(query), *freqs_cis)
        key = rotated(key if attn.norm_k is None else attn.norm_k(key), *freqs_cis)
        seen = None if attention_mask is None else attention_mask[:, None, None, :]
        made = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen
        )
        return attn.to_out[0](made.transpose(1, 2).flatten(2, 3))
