"""Qwen2.5-VL (Bai et al. 2025): a language model that reads text, or text with pictures, and what sees the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovforge_convert import Port
from ovforge_diffusers.attention import before, check_windows
from ovforge_diffusers.ports import SCALE, Submodel

__all__ = ["CLASS", "is_whole", "language_model", "made_whole", "take_half", "vision_encoder"]

CLASS = "Qwen2_5_VLForConditionalGeneration"

_HALVES = {"text_config": {"num_hidden_layers": 0, "vocab_size": 1}, "vision_config": {"depth": 0}}
"""What stands, as long as a module is made, for a half that is not there: GGUF files hold one half each."""


def is_whole(config: Mapping[str, Any]) -> bool:
    """Say whether both halves are there."""
    return all(config.get(name, {}) is not None for name in _HALVES)


def made_whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that a module can be made of, if one half is None."""
    return {**config, **{name: small for name, small in _HALVES.items() if config.get(name, small) is None}}


def take_half(module: Any, config: Mapping[str, Any]) -> None:
    """Take the half out of a module that is None in its config."""
    if config.get("vision_config", {}) is None:
        del module.model.visual
    if config.get("text_config", {}) is None:
        del module.model.language_model, module.lm_head


def language_model(module: Any, *, pictures: bool) -> Submodel:
    """Describe the language model: the normalized states of its last layer.

    A token sees those before it that attention_mask has 1 for, and itself. If it reads `pictures`, too, position_ids
    are the places (time, row, column) of all tokens, i64 [3, batch, tokens], and visual_states f32 [batch, tokens,
    width] what stands where a picture's tokens are. Raises ModelError for windows of attention.
    """
    import torch

    model = module.model.language_model
    check_windows(model.config)
    width, picture = model.config.hidden_size, module.config.image_token_id

    def states_of(states: Any, attention_mask: Any, places: Any) -> tuple[Any, ...]:
        _, seen = before(torch.arange(states.shape[1])[None], attention_mask)
        turns = model.rotary_emb(states, places)
        for layer in model.layers:
            states = layer(states, attention_mask=seen.unsqueeze(1), position_embeddings=turns)
        return (model.norm(states),)

    def read_text(input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
        return states_of(model.embed_tokens(input_ids), attention_mask, torch.arange(input_ids.shape[1])[None, None])

    def read(input_ids: Any, attention_mask: Any, position_ids: Any, visual_states: Any) -> tuple[Any, ...]:
        states = torch.where((input_ids == picture).unsqueeze(-1), visual_states, model.embed_tokens(input_ids))
        return states_of(states, attention_mask, position_ids)

    inputs = [Port(name, (None, None), (2, 12), "i64") for name in ("input_ids", "attention_mask")]
    if pictures:
        inputs.append(Port("position_ids", (3, None, None), (3, 2, 12), "i64"))
        inputs.append(Port("visual_states", (None, None, width), (2, 12, width)))
    return Submodel(read if pictures else read_text, tuple(inputs), ("last_hidden_state",), SCALE)


def vision_encoder(module: Any) -> Submodel:
    """Describe what gives the states of one picture, cut into windows of patches.

    pixel_values f32 [windows, patches, values], attention_mask i64 [windows, patches] (0 for what fills up a window at
    the picture's edge), position_ids i64 [windows, patches, 2] (row, column) -> last_hidden_state f32 [windows, tokens,
    width]. The patches of a token follow each other. Most layers see a window, some the whole picture.
    """
    visual = module.model.visual
    config = visual.config
    merged = visual.spatial_merge_unit
    patches = (config.window_size // config.spatial_merge_size // config.patch_size) ** 2 * merged
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    whole = frozenset(config.fullatt_block_indexes)

    def forward(pixel_values: Any, attention_mask: Any, position_ids: Any) -> tuple[Any, ...]:
        windows = pixel_values.shape[0]
        states = visual.patch_embed(pixel_values.reshape(-1, values)).reshape(windows, patches, -1)
        cosines, sines = (
            turns.reshape(windows, patches, 1, -1)
            for turns in visual.rotary_pos_emb(states, position_ids.reshape(-1, 2))
        )
        near = (attention_mask > 0)[:, None, None]
        far = (attention_mask > 0).reshape(1, 1, 1, -1)
        for number, block in enumerate(visual.blocks):
            seen = far if number in whole else near
            states = states + _attended(block.attn, block.norm1(states), cosines, sines, seen, number in whole)
            states = states + block.mlp(block.norm2(states))
        made = visual.merger(states.reshape(windows * patches, -1))
        return (made.reshape(windows, patches // merged, -1),)

    return Submodel(
        forward,
        (
            Port("pixel_values", (None, patches, values), (2, patches, values)),
            Port("attention_mask", (None, patches), (2, patches), "i64"),
            Port("position_ids", (None, patches, 2), (2, patches, 2), "i64"),
        ),
        ("last_hidden_state",),
        SCALE,
    )


def _attended(layer: Any, states: Any, cosines: Any, sines: Any, seen: Any, whole: bool) -> Any:
    """Attend within each window [windows, patches, width], or over all of them."""
    import torch

    shape = states.shape
    query, key, value = layer.qkv(states).reshape(*shape[:2], 3, layer.num_heads, -1).unbind(2)
    parts = [_turned(query, cosines, sines), _turned(key, cosines, sines), value]
    if whole:
        parts = [part.reshape(1, -1, layer.num_heads, layer.head_dim) for part in parts]
    made = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), attn_mask=seen)
    return layer.proj(made.transpose(1, 2).reshape(shape))


def _turned(x: Any, cosines: Any, sines: Any) -> Any:
    import torch

    half = x.shape[-1] // 2
    return x * cosines + torch.cat([x[..., half:] * -1.0, x[..., :half]], dim=-1) * sines
