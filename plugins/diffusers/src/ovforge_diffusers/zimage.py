"""Z-Image's transformer (Tongyi-MAI 2025) over a batch: diffusers' own takes lists of tensors, one after the other.

Rotary position embeddings are computed in reals, in the form that the runtime fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import SCALE, Sizes, Submodel
from ovforge_diffusers.rotation import attending, rotated, rotation
from ovforge_diffusers.single_stream import single_stream

__all__ = ["MULTIPLE", "zimage", "zimage_controlnet"]

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


_THETA = 256.0


def zimage_controlnet(module: Any, latent: Sizes, samples: str, refined: str) -> Submodel:
    """Describe ZImageControlNetModel, which has no embeddings of its own: it takes what the transformer makes.

    `picture_tokens` are embedded latents, filled up; `tokens` those after the transformer's refiners, and the text's;
    `time` the embedded timestep. Some are refined by the ControlNet as well: these give what is added after the
    transformer's refiners, too, for which they take the scale as an input. Outputs begin with `samples` and `refined`.
    """
    config = module.config
    rows = latent.batch and 2 * latent.batch
    width, channels, head = config.dim, config.control_in_dim, config.dim // config.n_heads
    # A quarter of a head's channels for the first place, the rest in halves for rows and columns, as published.
    module.rope_embedder = rotation([head // 4, head * 3 // 8, head * 3 // 8], _THETA)
    blocks = [*module.control_layers, *(module.control_noise_refiner or ())]
    places = config.control_refiner_layers_places or [] if config.add_control_noise_refiner else []

    def forward(
        picture_tokens: Any, tokens: Any, time: Any, txt_ids: Any, img_ids: Any, controlnet_cond: Any
    ) -> tuple[Any, ...]:
        with attending([block.attention for block in blocks], _Attention()):
            return _controlled(module, picture_tokens, tokens, time, txt_ids, img_ids, controlnet_cond)

    filled = latent.height and latent.width and (latent.height // _PATCH) * (latent.width // _PATCH)
    filled = filled and filled + -filled % MULTIPLE
    time = min(width, module.control_layers[0].adaLN_modulation[0].in_features)
    inputs = (
        Port("picture_tokens", (rows, filled, width), (2, MULTIPLE, width)),
        Port("tokens", (rows, None, width), (2, 2 * MULTIPLE, width)),
        Port("time", (rows, time), (2, time)),
        Port("txt_ids", (rows, None, 3), (2, MULTIPLE, 3), "i64"),
        Port("img_ids", (rows, filled, 3), (2, MULTIPLE, 3), "i64"),
        Port("controlnet_cond", (rows, channels, latent.height, latent.width), (2, channels, 6, 4)),
    )
    names = [f"{samples}{number}" for number in range(len(module.control_layers))]
    names += [f"{refined}{number}" for number in range(len(places))]
    return Submodel(forward, inputs, tuple(names), SCALE)


def _controlled(
    module: Any, picture: Any, tokens: Any, time: Any, txt_ids: Any, img_ids: Any, condition: Any
) -> tuple[Any, ...]:
    """Return what ZImageControlNetModel gives for each of its layers, and what is added after refiners, not scaled."""
    import torch

    config = module.config
    picture_turns, text_turns = module.rope_embedder(img_ids), module.rope_embedder(txt_ids)
    context = module.control_all_x_embedder[_KEY](_patches(condition))
    context = torch.cat([context, picture[:, context.shape[1] :]], dim=1)  # filled up by the transformer's own
    refined: Sequence[Any] = ()
    if config.add_control_noise_refiner is None:
        for layer in module.control_noise_refiner:
            context = layer(context, None, picture_turns, time)
    else:
        own = config.add_control_noise_refiner == "control_noise_refiner"
        layers = module.control_noise_refiner if own else module.control_layers
        refined, context = _samples(layers, context, picture, None, picture_turns, time)
        refined = refined[: len(config.control_refiner_layers_places or [])]
    turns = tuple(torch.cat(pair, dim=1) for pair in zip(picture_turns, text_turns, strict=True))
    seen = torch.cat([img_ids[..., 0] >= 0, txt_ids[..., 0] > 0], dim=1)
    both = torch.cat([context, tokens[:, context.shape[1] :]], dim=1)
    samples, _ = _samples(module.control_layers, both, tokens, seen, turns, time)
    return (*samples, *refined)


def _samples(layers: Sequence[Any], context: Any, tokens: Any, seen: Any, turns: Any, time: Any) -> tuple[Any, Any]:
    """Return what each layer gives, and the context behind the last one."""
    samples = []
    for layer in layers:  # all but the first take the samples so far, with the context as the last of them
        given = context if layer.block_id == 0 else context.unsqueeze(0)
        sample, context = layer(given, tokens, seen, turns, time).unbind(0)
        samples.append(sample)
    return samples, context


def _patches(latents: Any) -> Any:
    """Return tokens of 2 x 2 latents, [batch, tokens, channels * 4]."""
    batch, channels, height, width = latents.shape
    high, wide = height // _PATCH, width // _PATCH
    patches = latents.reshape(batch, channels, high, _PATCH, wide, _PATCH).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, high * wide, _PATCH * _PATCH * channels)


def _predict(module: Any, latents: Any, timestep: Any, states: Any, mask: Any, txt_ids: Any, img_ids: Any) -> Any:
    """Return what ZImageTransformer2DModel gives for each row, [batch, channels, height, width]."""
    import torch

    batch, _, height, width = latents.shape
    high, wide = height // _PATCH, width // _PATCH
    time = module.t_embedder(timestep * module.t_scale)
    picture_turns, text_turns = module.rope_embedder(img_ids), module.rope_embedder(txt_ids)

    picture = module.all_x_embedder[_KEY](_patches(latents))
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
