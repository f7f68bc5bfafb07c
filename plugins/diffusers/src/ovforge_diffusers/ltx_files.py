"""LTX-Video's autoencoder in single files: diffusers' names of its tensors, and its config from their shapes.

The makers number the parts of encoder and decoder one after the other, whatever they are: residual blocks of one size,
a block that changes the number of channels, a layer that changes sides or frames.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ovforge.errors import ModelError
from ovforge_diffusers.header import Shapes

__all__ = ["ltx_autoencoder_config", "ltx_autoencoder_names"]

_STATISTICS = {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}
_INSIDE = (
    ("res_blocks.", "resnets."),
    ("conv_shortcut.", "conv_shortcut.conv."),
    ("norm3.norm.", "norm3."),
    ("last_time_embedder.", "time_embedder."),
    ("last_scale_shift_table", "scale_shift_table"),
)
_PART = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d{1,3})\.(.+)")
_STRIDES = {4: "spatial", 2: "temporal", 8: "spatiotemporal"}
"""How many values of a layer that folds become one -> which sides it halves."""


def ltx_autoencoder_names(names: Iterable[str]) -> dict[str, str]:
    """Return the makers' name -> diffusers' name, without statistics that are for training only."""
    names = list(names)
    places = {side: dict(_places(names, side)) for side in ("encoder.down", "decoder.up")}
    found = {}
    for name in names:
        if name.startswith("per_channel_statistics."):
            statistic = _STATISTICS.get(name.partition(".")[2])
            if statistic:
                found[name] = statistic
            continue
        new = name
        if part := _PART.fullmatch(name):
            new = f"{part[1].partition('.')[0]}.{places[part[1]][int(part[2])]}.{part[3]}"
        for old, ours in _INSIDE:
            new = new.replace(old, ours)
        found[name] = new
    return found


def _places(names: list[str], side: str) -> Iterator[tuple[int, str]]:
    """Yield where each numbered part is in diffusers: layers that are not blocks belong to a block beside them."""
    kinds: dict[int, str] = {}
    for name in names:
        if (part := _PART.fullmatch(name)) and part[1] == side:
            number, inside = int(part[2]), part[3]
            if inside.startswith("res_blocks."):
                kinds[number] = "blocks"
            elif inside.startswith("conv."):
                kinds[number] = "scale"
            else:
                kinds.setdefault(number, "channels")
    last = max((number for number, kind in kinds.items() if kind == "blocks"), default=-1)
    level = -1
    for number in sorted(kinds):
        kind = kinds[number]
        if side == "decoder.up":  # the layers before a block are its own
            place = {"blocks": "", "scale": ".upsamplers.0", "channels": ".conv_in"}[kind]
            yield number, "mid_block" if level < 0 and kind == "blocks" else f"up_blocks.{level}{place}"
            level += kind == "blocks"
        else:  # those behind it are
            level += kind == "blocks"
            place = {"blocks": "", "scale": ".downsamplers.0", "channels": ".conv_out"}[kind]
            yield number, "mid_block" if number == last else f"down_blocks.{level}{place}"


def ltx_autoencoder_config(own: Shapes) -> dict[str, Any]:
    """Return the config of tensors in diffusers' names. Raises ModelError for an autoencoder of LTX-2."""
    downs, ups = (list(_blocks(own, side)) for side in ("encoder.down_blocks", "decoder.up_blocks"))
    middle = own["encoder.mid_block.resnets.0.conv1.conv.weight"][0]
    folds = [own.get(f"encoder.down_blocks.{n}.downsamplers.0.conv.conv.weight") for n in range(len(downs))]
    timed = "decoder.time_embedder.timestep_embedder.linear_1.weight" in own
    channels = [width for _, width in downs]
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLLTXVideo",
        "latent_channels": own["decoder.conv_in.conv.weight"][1],
        "patch_size": math.isqrt(own["encoder.conv_in.conv.weight"][1] // 3),
        "block_out_channels": channels,
        "layers_per_block": [*(count for count, _ in downs), _layers(own, "encoder.mid_block")],
        "spatio_temporal_scaling": [_scales(own, f"encoder.down_blocks.{n}.downsamplers.0") for n in range(len(downs))],
        "timestep_conditioning": timed,
        **_decoder(own, ups),
    }
    if not any(folds):
        return config
    if not timed:
        raise ModelError("it is the autoencoder of LTX-2, which makes sound, too", hint="LTX-Video is known to 0.9.8.")
    kinds = [
        _STRIDES[after // fold[0]] if fold else "conv"
        for fold, after in zip(folds, [*channels[1:], middle], strict=True)
    ]
    spatial, temporal = (sum(kind in (name, "spatiotemporal") for kind in kinds) for name in ("spatial", "temporal"))
    return config | {
        "block_out_channels": [*channels, middle],
        "down_block_types": ["LTXVideo095DownBlock3D"] * len(downs),
        "downsample_type": kinds,
        "spatial_compression_ratio": config["patch_size"] * 2**spatial,
        "temporal_compression_ratio": 2**temporal,
    }


def _decoder(own: Shapes, ups: list[tuple[int, int]]) -> dict[str, Any]:
    """Return what of the config is the decoder's: lists that begin at the end."""
    layers = [f"decoder.up_blocks.{n}.upsamplers.0.conv.conv.weight" for n in range(len(ups))]
    factors = [own[name][1] * 8 // own[name][0] if name in own else 1 for name in layers]
    blocks = ["decoder.mid_block", *(f"decoder.up_blocks.{n}" for n in range(len(ups)))]
    lists: dict[str, list[Any]] = {
        "decoder_block_out_channels": [width * factor for (_, width), factor in zip(ups, factors, strict=True)],
        "decoder_layers_per_block": [_layers(own, block) for block in blocks],
        "decoder_spatio_temporal_scaling": [name in own for name in layers],
        "decoder_inject_noise": [f"{block}.resnets.0.per_channel_scale1" in own for block in blocks],
        "upsample_residual": [factor > 1 for factor in factors],  # as in all that are published
        "upsample_factor": factors,
    }
    return {name: values[::-1] for name, values in lists.items()}


def _blocks(own: Shapes, side: str) -> Iterator[tuple[int, int]]:
    """Yield the number of residual blocks, and of channels, of each size."""
    number = 0
    while count := _layers(own, f"{side}.{number}"):
        yield count, own[f"{side}.{number}.resnets.0.conv1.conv.weight"][0]
        number += 1


def _layers(own: Shapes, block: str) -> int:
    count = 0
    while f"{block}.resnets.{count}.conv1.conv.weight" in own:
        count += 1
    return count


def _scales(own: Shapes, layer: str) -> bool:
    return f"{layer}.conv.weight" in own or f"{layer}.conv.conv.weight" in own
