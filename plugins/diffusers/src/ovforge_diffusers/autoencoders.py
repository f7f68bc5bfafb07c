"""Autoencoders in single files: configs from the shapes of their tensors, and weights in diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovforge_diffusers import infer
from ovforge_diffusers.header import Part, Shapes
from ovforge_diffusers.ltx_files import ltx_autoencoder_config, ltx_autoencoder_names
from ovforge_diffusers.ltx_vae import CLASS as LTX_VAE
from ovforge_diffusers.naming import original_name, to_diffusers, wan_names

__all__ = ["autoencoder_config", "autoencoder_names", "autoencoder_weights"]


def autoencoder_config(part: Part, shapes: Shapes, latents: tuple[float, float] | None) -> dict[str, Any]:
    """Return the config of an autoencoder.

    `latents` are the factor and the shift of a known family. An AutoencoderKL of 16 channels does not say whose it is:
    without them, both are None in its config, and who reads it must know the transformer's family.
    """
    own = part.strip(shapes)
    if part.kind == LTX_VAE:
        ours = part.naming == "diffusers"
        return ltx_autoencoder_config(
            own if ours else {new: own[old] for old, new in ltx_autoencoder_names(own).items()}
        )
    if part.kind == "AutoencoderKLQwenImage":
        return _qwenimage(own if part.naming == "diffusers" else _renamed(own))
    config = infer.vae_config(part, shapes, scaling_factor=None, size=1024)
    if part.kind == "AutoencoderKLFlux2":
        del config["scaling_factor"]  # its latents have statistics instead
        return config
    factor, shift = latents or (None, None)
    return config | {"scaling_factor": factor, "shift_factor": shift}


def _renamed(own: Shapes) -> dict[str, tuple[int, ...]]:
    return {new: own[name] for new, name in wan_names(own).items()}


def _qwenimage(own: Shapes) -> dict[str, Any]:
    """Read a flat list of residual blocks, after each level but the last one that halves the sides."""
    base, channels = own["encoder.conv_in.weight"][:2]
    widths: list[int] = []
    temporal: list[bool] = []
    blocks = number = 0
    while True:
        block = f"encoder.down_blocks.{number}."
        if (width := own.get(f"{block}conv1.weight")) is not None:
            blocks += len(temporal) == 0
            widths[len(temporal) :] = [width[0]]
        elif f"{block}resample.1.weight" in own:
            temporal.append(f"{block}time_conv.weight" in own)
        else:
            break
        number += 1
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": own["post_quant_conv.weight"][0],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": blocks,
        "temperal_downsample": temporal,
        "input_channels": channels,
    }


def autoencoder_names(part: Part, shapes: Shapes, config: dict[str, Any]) -> dict[str, str]:
    """Return the name in the file -> the name that `autoencoder_weights` knows; what is for training is left out."""
    names = {part.prefix + name: name for name in part.strip(shapes)}
    if part.naming == "diffusers":
        return names
    if part.kind == LTX_VAE:
        given = ltx_autoencoder_names(names.values())
        return {stored: given[name] for stored, name in names.items() if name in given}
    known = {stored: original_name(part, name, config) for stored, name in names.items()}
    return {stored: name for stored, name in known.items() if name is not None}


def autoencoder_weights(part: Part, tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return tensors by diffusers' names. Raises ModelError for those that have no place there."""
    if part.naming == "diffusers" or part.kind == LTX_VAE:
        return dict(tensors)
    return to_diffusers(part, dict(tensors), config)
