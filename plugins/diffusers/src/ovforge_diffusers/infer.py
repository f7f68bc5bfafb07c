"""Configs from the shapes of tensors: what a checkpoint does not say of itself, its shapes do.

What they cannot tell are the families' rules, the same in all published models: Stable Diffusion 1 has 8 heads in each
attention of its UNet, every other UNet and all text encoders heads of 64 channels; groups of normalisation are 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ovforge.errors import ModelError
from ovforge_diffusers.header import Part, Shapes

__all__ = ["IRREGULAR", "controlnet_config", "guessed", "text_config", "unet_config", "vae_config"]

PUBLISHED = (320, 384)
"""Channels of the first level of every published UNet and ControlNet, SDXL's refiner being the second."""

IRREGULAR = "Name a diffusers folder that has its configs: the loader's option config = FOLDER."


@dataclass(frozen=True, slots=True)
class _Level:
    """A level of a UNet: channels, residual blocks, and the depth of its transformers (0: no attention)."""

    channels: int
    blocks: int
    depth: int


def unet_config(part: Part, shapes: Shapes, *, text_width: int | None, refiner: bool, size: int) -> dict[str, Any]:
    """Return the config of a UNet for pictures whose latents have `size` a side.

    `text_width` is that of the pooled text embedding where the checkpoint's text encoder says it.
    """
    own = part.strip(shapes)
    names = _ORIGINAL if part.naming == "original" else _DIFFUSERS
    config = _down_half(own, names)
    config |= {
        "_class_name": part.kind,
        "sample_size": size,
        "out_channels": _shape(own, names.conv_out)[0],
        "up_block_types": [
            "CrossAttnUpBlock2D" if kind.startswith("CrossAttn") else "UpBlock2D"
            for kind in reversed(config["down_block_types"])
        ],
        "time_cond_proj_dim": own[names.guidance][1] if names.guidance in own else None,
    }
    if names.classes in own:
        config["num_class_embeds"] = own[names.classes][0]
    return config | _added(own, names, text_width, refiner)


def controlnet_config(part: Part, shapes: Shapes, *, text_width: int | None) -> dict[str, Any]:
    """Return the config of a ControlNet."""
    own = part.strip(shapes)
    names = _ORIGINAL if part.naming == "original" else _DIFFUSERS
    hints = [own[name] for name in names.hints if name in own]
    return {
        **_down_half(own, names),
        "_class_name": part.kind,
        "conditioning_channels": hints[0][1],
        "conditioning_embedding_out_channels": [hint[0] for hint in hints],
        **_added(own, names, text_width, refiner=False),
    }


def vae_config(part: Part, shapes: Shapes, *, scaling_factor: float | None, size: int) -> dict[str, Any]:
    """Return the config of an autoencoder for pictures of `size` a side; a `scaling_factor` of None is not known."""
    own = part.strip(shapes)
    block = "encoder.down.{}.block.{}" if part.naming == "original" else "encoder.down_blocks.{}.resnets.{}"
    levels = _count(own, block.format("{}", 0) + ".conv1.weight")
    channels = [own[block.format(level, 0) + ".conv1.weight"][0] for level in range(levels)]
    layers = _count(own, block.format(0, "{}") + ".conv1.weight")
    attention = "encoder.mid.attn_1.norm.weight" if part.naming == "original" else _VAE_ATTENTION
    return {
        "_class_name": part.kind,
        "in_channels": _shape(own, "encoder.conv_in.weight")[1],
        "out_channels": _shape(own, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(own, "decoder.conv_in.weight")[1],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": _groups(channels),
        "mid_block_add_attention": attention in own,
        "use_quant_conv": bool({"quant_conv.weight", "encoder.quant_conv.weight"} & own.keys()),
        "use_post_quant_conv": bool({"post_quant_conv.weight", "decoder.post_quant_conv.weight"} & own.keys()),
        "sample_size": size,
        "scaling_factor": scaling_factor,
    }


_VAE_ATTENTION = "encoder.mid_block.attentions.0.group_norm.weight"


def text_config(part: Part, shapes: Shapes) -> dict[str, Any]:
    """Return the config of a text encoder.

    Stable Diffusion 2 uses the last but one layer of its encoder: the last one is left out, as diffusers does.
    """
    own = part.strip(shapes)
    if part.naming == "open_clip":
        words, positions, inner = (
            _shape(own, name)
            for name in ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
        )
        layers = _count(own, "transformer.resblocks.{}.mlp.c_fc.weight")
        stripped = (words[1], layers) == (1024, 23)  # files that were pruned of what is not used
        layers -= part.kind == "CLIPTextModel" and not stripped
    else:
        words, positions, inner = (
            _shape(own, name)
            for name in (
                "embeddings.token_embedding.weight",
                "embeddings.position_embedding.weight",
                "encoder.layers.0.mlp.fc1.weight",
            )
        )
        layers = _count(own, "encoder.layers.{}.mlp.fc1.weight")
    vocabulary, width = words
    return {
        "architectures": [part.kind],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width),
        "max_position_embeddings": positions[0],
        "hidden_act": "gelu" if part.naming == "open_clip" else "quick_gelu",
        "projection_dim": own["text_projection"][1] if "text_projection" in own else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if part.naming == "open_clip" else vocabulary - 1,
    }


def guessed(config: dict[str, Any]) -> bool:
    """Say whether a UNet or ControlNet has sizes that no published one has: its heads are then a guess."""
    return config["block_out_channels"][0] not in PUBLISHED


@dataclass(frozen=True, slots=True)
class _Names:
    """Where two namings keep what tells of a UNet's form."""

    conv_in: str
    conv_out: str
    guidance: str
    classes: str
    added: str
    middle: str
    hints: tuple[str, ...]
    """Convolutions of a ControlNet's picture that change its channels."""


_ORIGINAL = _Names(
    conv_in="input_blocks.0.0.weight",
    conv_out="out.2.weight",
    guidance="time_embed.cond_proj.weight",
    classes="label_emb.weight",
    added="label_emb.0.0.weight",
    middle="middle_block.1",
    hints=tuple(f"input_hint_block.{number}.weight" for number in (0, 4, 8, 12)),
)
_DIFFUSERS = _Names(
    conv_in="conv_in.weight",
    conv_out="conv_out.weight",
    guidance="time_embedding.cond_proj.weight",
    classes="class_embedding.weight",
    added="add_embedding.linear_1.weight",
    middle="mid_block.attentions.0",
    hints=(
        "controlnet_cond_embedding.conv_in.weight",
        *(f"controlnet_cond_embedding.blocks.{number}.weight" for number in range(1, 16, 2)),
    ),
)


def _down_half(own: Shapes, names: _Names) -> dict[str, Any]:
    """Return the part of a config that UNets and ControlNets share."""
    levels = _original_levels(own) if names is _ORIGINAL else _diffusers_levels(own)
    middle = _count(own, names.middle + ".transformer_blocks.{}.norm1.weight")
    blocks = {level.blocks for level in levels}
    if len(blocks) != 1 or not middle or levels[-1].depth not in (0, middle):
        raise ModelError("the blocks of its UNet are not those of a model that is known", hint=IRREGULAR)
    depths = [level.depth for level in levels]
    depths[-1] = middle
    used = {depth for depth in depths if depth}
    channels = [level.channels for level in levels]
    projection = _shape(own, f"{names.middle}.proj_in.weight")
    linear = len(projection) == 2
    return {
        "in_channels": _shape(own, names.conv_in)[1],
        "block_out_channels": channels,
        "layers_per_block": blocks.pop(),
        "down_block_types": ["CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in levels],
        "transformer_layers_per_block": used.pop() if len(used) == 1 else [depth or 1 for depth in depths],
        "cross_attention_dim": _shape(own, f"{names.middle}.transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": [_heads(each) for each in channels] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": _groups(channels),
    }


def _original_levels(own: Shapes) -> list[_Level]:
    found: list[list[tuple[int, int]]] = [[]]
    number = 1
    while True:
        entry = f"input_blocks.{number}"
        if f"{entry}.0.op.weight" in own:
            found.append([])
        elif f"{entry}.0.in_layers.2.weight" in own:
            depth = _count(own, entry + ".1.transformer_blocks.{}.norm1.weight")
            found[-1].append((own[f"{entry}.0.in_layers.2.weight"][0], depth))
        else:
            return [_level(blocks) for blocks in found]
        number += 1


def _diffusers_levels(own: Shapes) -> list[_Level]:
    levels: list[_Level] = []
    while True:
        level = f"down_blocks.{len(levels)}"
        blocks: list[tuple[int, int]] = []
        while (name := f"{level}.resnets.{len(blocks)}.conv1.weight") in own:
            transformer = f"{level}.attentions.{len(blocks)}.transformer_blocks"
            depth = _count(own, transformer + ".{}.norm1.weight")
            blocks.append((own[name][0], depth))
        if not blocks:
            return levels
        levels.append(_level(blocks))


def _level(blocks: list[tuple[int, int]]) -> _Level:
    if len(set(blocks)) != 1:
        raise ModelError("the blocks of its UNet differ within a level", hint=IRREGULAR)
    (channels, depth), *_ = blocks
    return _Level(channels, len(blocks), depth)


def _added(own: Shapes, names: _Names, text_width: int | None, refiner: bool) -> dict[str, Any]:
    """Return the config of SDXL's added conditions: a pooled text embedding and 6 numbers, 5 for the refiner."""
    if names.added not in own:
        return {}
    total = own[names.added][1]
    numbers = 5 if refiner else 6
    each = 256 if text_width is None else (total - text_width) // numbers
    if each < 1 or total <= numbers * each or text_width not in (None, total - numbers * each):
        raise ModelError(f"added conditions of {total} numbers fit no text encoder that is known", hint=IRREGULAR)
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": total,
    }


def _count(own: Shapes, pattern: str) -> int:
    """Return for how many numbers from 0 on a name is there."""
    number = 0
    while pattern.format(number) in own:
        number += 1
    return number


def _shape(own: Shapes, name: str) -> tuple[int, ...]:
    """Return a shape of at least two sides."""
    if len(own.get(name, ())) < 2:
        raise ModelError(f"{name} is missing, or no matrix", hint="The file may be damaged: fetch it again.")
    return own[name]


def _heads(width: int) -> int:
    return max(1, width // 64)


def _groups(channels: list[int]) -> int:
    return math.gcd(32, *channels)
