"""Qwen-Image's transformer (Wu et al. 2025): two streams, and places of tokens that are counted inside of the graph.

The inputs `height` and `width` are those of optimum-intel's export, in tokens: one number each. A model that sees
pictures beside the latents takes a list, of the latents first and then of each picture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import SCALE, Sizes, Submodel
from ovforge_diffusers.rotation import rotated, rotation

__all__ = ["qwenimage", "qwenimage_controlnet"]

_THETA = 10000.0
_REFUSED = {
    "guidance_embeds": "it takes a guidance scale as an input, which diffusers' class has no layers for",
    "use_additional_t_cond": "it makes pictures of layers (Qwen-Image-Layered), which this loader does not convert",
    "use_layer3d_rope": "it makes pictures of layers (Qwen-Image-Layered), which this loader does not convert",
}


def qwenimage(module: Any, latent: Sizes) -> Submodel:
    """Describe QwenImageTransformer2DModel: latents of 2 x 2 pixels packed to rows, as in FLUX.

    What fills up a text has 0 in encoder_hidden_states_mask, and nothing sees it. Rows are those of a batch: guidance
    is a second call in diffusers. Raises ModelError for Qwen-Image-Layered, and for guidance as an input.
    """
    config = module.config
    for name, why in _REFUSED.items():
        if config.get(name):
            raise ModelError(
                why,
                where=f"transformer/config.json: {name}",
                hint="Take Qwen-Image, or Qwen-Image-Edit.",
            )
    module.pos_embed = rotation(config.axes_dims_rope, _THETA)

    def forward(
        hidden_states: Any,
        encoder_hidden_states: Any,
        encoder_hidden_states_mask: Any,
        timestep: Any,
        height: Any,
        width: Any,
    ) -> tuple[Any, ...]:
        sides = height.reshape(-1), width.reshape(-1)
        return (_predict(module, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, *sides),)

    return Submodel(forward, _inputs(config, latent), ("out_hidden_states",), SCALE)


def _inputs(config: Any, latent: Sizes) -> tuple[Port, ...]:
    """Return what the transformer and its ControlNets take alike; of latents that others stand beside, any number."""
    rows, width, channels = latent.batch, config.joint_attention_dim, config.in_channels
    packed = latent.height and latent.width and (latent.height // 2) * (latent.width // 2)
    sides = (None,) if latent.beside else ()
    example = tuple(1 for _ in sides)  # a picture of one token
    return (
        Port("hidden_states", (rows, None if latent.beside else packed, channels), (2, 1, channels)),
        Port("encoder_hidden_states", (rows, None, width), (2, 7, width)),
        Port("encoder_hidden_states_mask", (rows, None), (2, 7), "i64"),
        Port("timestep", (rows,), (2,)),
        Port("height", sides, example, "i64"),
        Port("width", sides, example, "i64"),
    )


def qwenimage_controlnet(module: Any, latent: Sizes, outputs: tuple[str, ...]) -> Submodel:
    """Describe QwenImageControlNetModel, which takes what the transformer takes, and packed latents of a condition.

    One for inpainting also takes what stays of the mask, packed beside them.
    """
    config = module.config
    inputs = _inputs(config, replace(latent, beside=False))
    rows, packed, _ = inputs[0].shape
    condition = config.in_channels + config.extra_condition_channels
    module.pos_embed = rotation(config.axes_dims_rope, _THETA)

    def forward(
        hidden_states: Any,
        encoder_hidden_states: Any,
        encoder_hidden_states_mask: Any,
        timestep: Any,
        height: Any,
        width: Any,
        controlnet_cond: Any,
    ) -> tuple[Any, ...]:
        picture = module.img_in(hidden_states) + module.controlnet_x_embedder(controlnet_cond)
        sides = height.reshape(-1), width.reshape(-1)
        pictures, _ = _blocks(module, picture, encoder_hidden_states, encoder_hidden_states_mask, timestep, *sides)
        return tuple(add(each) for add, each in zip(module.controlnet_blocks, pictures, strict=True))

    shown = Port("controlnet_cond", (rows, packed, condition), (2, 1, condition))
    return Submodel(forward, (*inputs, shown), outputs, SCALE)


def _predict(module: Any, latents: Any, states: Any, mask: Any, timestep: Any, heights: Any, widths: Any) -> Any:
    """Return what QwenImageTransformer2DModel gives for each token, [batch, tokens, channels].

    The first of `heights` and `widths` are the latents' own; the others those of pictures beside them.
    """
    pictures, time = _blocks(module, module.img_in(latents), states, mask, timestep, heights, widths)
    if module.zero_cond_t:
        time = time.chunk(2)[0]
    return module.proj_out(module.norm_out(pictures[-1], time))


def _blocks(
    module: Any, picture: Any, states: Any, mask: Any, timestep: Any, heights: Any, widths: Any
) -> tuple[list[Any], Any]:
    """Return what each block makes of embedded tokens, [batch, tokens, width], and the embedded timestep."""
    import torch

    text = module.txt_in(module.txt_norm(states))
    tokens = torch.arange(picture.shape[1])
    places, start = _places(tokens, heights, widths)
    words = (start + torch.arange(text.shape[1])).unsqueeze(-1).expand(-1, places.shape[-1])
    turns = module.pos_embed(places.unsqueeze(0)), module.pos_embed(words.unsqueeze(0))
    shown = None
    if getattr(module, "zero_cond_t", False):  # pictures beside the latents are told that there is no noise in them
        timestep = torch.cat([timestep, timestep * 0.0])
        shown = (tokens >= heights[0] * widths[0]).to(torch.int64).unsqueeze(0).expand(picture.shape[0], -1)
    time = module.time_text_embed(timestep, picture)
    seen = torch.cat([mask > 0, torch.ones_like(picture[:, :, 0]) > 0], dim=1)[:, None, None]
    pictures = []
    *blocks, last = module.transformer_blocks
    for block in blocks:
        picture, text = _block(block, picture, text, seen, time, turns, shown)
        pictures.append(picture)
    pictures.append(_block(last, picture, text, seen, time, turns, shown, last=True)[0])
    return pictures, time


def _places(tokens: Any, heights: Any, widths: Any) -> tuple[Any, Any]:
    """Return (picture, row, column) of each token, [tokens, 3], and the place of the first word.

    Rows and columns are counted from the middle of each picture; words stand behind the longest half of a side, on all
    three axes.
    """
    import torch

    sizes = heights * widths
    ends = torch.cumsum(sizes, 0)
    picture = (tokens.unsqueeze(1) >= ends.unsqueeze(0)).to(torch.int64).sum(1)
    high, wide, begin = (each[picture] for each in (heights, widths, ends - sizes))
    within = tokens - begin
    row = torch.div(within, wide, rounding_mode="floor")
    column = within - row * wide
    half_high, half_wide = (torch.div(each, 2, rounding_mode="floor") for each in (high, wide))
    places = torch.stack([picture, row - (high - half_high), column - (wide - half_wide)], dim=-1)
    start = torch.maximum(half_high.max(), half_wide.max())
    return places, start


def _block(
    block: Any, picture: Any, text: Any, seen: Any, time: Any, turns: Any, shown: Any, *, last: bool = False
) -> tuple[Any, Any]:
    """Return what QwenImageTransformerBlock makes of both streams. Nothing takes the text of the `last` one."""
    words = time if shown is None else time.chunk(2)[0]
    first, second = block.img_mod(time).chunk(2, dim=-1)
    first_text, second_text = block.txt_mod(words).chunk(2, dim=-1)
    of_picture, gate = block._modulate(block.img_norm1(picture), first, shown)
    of_text, text_gate = block._modulate(block.txt_norm1(text), first_text)
    made = _attended(block.attn, of_picture, of_text, seen, turns)
    length = text.shape[1]
    picture = picture + gate * block.attn.to_out[0](made[:, length:])
    of_picture, gate = block._modulate(block.img_norm2(picture), second, shown)
    picture = picture + gate * block.img_mlp(of_picture)
    if last:
        return picture, text
    text = text + text_gate * block.attn.to_add_out(made[:, :length])
    of_text, text_gate = block._modulate(block.txt_norm2(text), second_text)
    return picture, text + text_gate * block.txt_mlp(of_text)


def _attended(attn: Any, picture: Any, text: Any, seen: Any, turns: Any) -> Any:
    """Return what QwenDoubleStreamAttnProcessor2_0 gives before its last layers: of the text, and then of the picture.

    Its own rotation is a product of complex numbers.
    """
    import torch

    def split(layers: tuple[Any, ...], states: Any) -> list[Any]:
        return [layer(states).unflatten(-1, (attn.heads, -1)) for layer in layers]

    query, key, value = split((attn.to_q, attn.to_k, attn.to_v), picture)
    text_query, text_key, text_value = split((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text)
    picture_turns, text_turns = turns
    both = (
        (rotated(attn.norm_added_q(text_query), *text_turns), rotated(attn.norm_q(query), *picture_turns)),
        (rotated(attn.norm_added_k(text_key), *text_turns), rotated(attn.norm_k(key), *picture_turns)),
        (text_value, value),
    )
    made = torch.nn.functional.scaled_dot_product_attention(
        *(torch.cat(pair, dim=1).transpose(1, 2) for pair in both), attn_mask=seen
    )
    return made.transpose(1, 2).flatten(2, 3)
