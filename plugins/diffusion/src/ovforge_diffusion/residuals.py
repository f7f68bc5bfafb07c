"""What ControlNets give, and where denoisers take it: rules of diffusers' classes, by names of inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ovforge.errors import ModelError

__all__ = [
    "BLOCK",
    "CONTROLNETS",
    "MIDDLE_RESIDUAL",
    "REFINED",
    "RESIDUAL",
    "RESIDUALS",
    "SCALE",
    "SINGLE",
    "block_residuals",
    "blocks_of",
    "check_class",
    "residual_shapes",
    "unet_residuals",
]

CONTROLNETS = ("controlnet", "controlnet_1", "controlnet_2", "controlnet_3")

RESIDUAL = "down_block_additional_residual_"
"""The UNet's inputs for what ControlNets give, before their number: names of diffusers and OpenVINO's notebooks."""

MIDDLE_RESIDUAL = "mid_block_additional_residual"

BLOCK = "block_additional_residual_"
"""A transformer's inputs for what is added after its blocks, before the block's number."""

SAMPLE, SINGLE = "controlnet_block_samples_", "controlnet_single_block_samples_"
"""Outputs of a transformer's ControlNet, before their number; the second are added where FLUX has joined its streams,
to the tokens of the picture."""

REFINED = "controlnet_refiner_samples_"
"""Outputs of Z-Image's ControlNets that are added after the blocks which refine the picture's tokens."""

SCALE = "conditioning_scale"
"""Input of a ControlNet for its scale, if it needs that inside."""

RESIDUALS = "ovforge_residuals"
"""Key of the denoiser's config.json for the number of such inputs, where the transform controlnet-inputs made them."""

_CLASSES = {
    "UNet2DConditionModel": "ControlNetModel",
    "SD3Transformer2DModel": "SD3ControlNetModel",
    "FluxTransformer2DModel": "FluxControlNetModel",
    "QwenImageTransformer2DModel": "QwenImageControlNetModel",
    "SanaTransformer2DModel": "SanaControlNetModel",
    "ZImageTransformer2DModel": "ZImageControlNetModel",
}
"""Class of a denoiser -> class of its ControlNets."""


def check_class(role: str, config: Mapping[str, Any], denoiser: str, denoising: Mapping[str, Any]) -> None:
    """Refuse a ControlNet that was made for another class of denoiser; what names no class is for a UNet.

    Raises ModelError.
    """
    kind = str(config.get("_class_name") or "ControlNetModel")
    own = "UNet2DConditionModel" if denoiser == "unet" else str(denoising.get("_class_name"))
    wanted = _CLASSES.get(own)
    if wanted is None:
        families = "Stable Diffusion 1, 2, XL, 3 and 3.5, FLUX.1, Qwen-Image, Sana and Z-Image"
        raise ModelError(
            f"no ControlNet goes with a {own}", where=role,
            hint=f"ControlNets go with {families}: leave it out of [load.parts].",
        )  # fmt: skip
    if kind != wanted:
        fits = next((each for each, net in _CLASSES.items() if net == kind), "another denoiser")
        raise ModelError(
            f"it is a {kind}, made for a {fits}, and the model has a {own}",
            where=f"{role}/config.json",
            hint=f"Take a {wanted}.",
        )


def residual_shapes(config: Mapping[str, Any], sample: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return shapes of the inputs for residuals by name, as a UNet's config tells them for a sample of a shape.

    They are those of what its way down leaves: the first convolution, then each layer of each level, and what halves
    the sides after each level but the last.
    """
    rows, _, height, width = sample
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block", 2)
    if not widths:
        return {}
    each = layers if isinstance(layers, list | tuple) else [layers] * len(widths)
    if not all(isinstance(count, int) and 0 <= count <= _MOST for count in each):
        raise ModelError(
            f"layers_per_block = {layers!r} are not numbers of layers", where="unet/config.json",
            hint="Take the config.json that diffusers wrote for the model.",
        )  # fmt: skip
    shapes = [(rows, widths[0], height, width)]
    for level, (channels, count) in enumerate(zip(widths, each, strict=False)):
        shapes += [(rows, channels, height, width)] * count
        if level + 1 < len(widths):
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((rows, channels, height, width))
    return {**{f"{RESIDUAL}{number}": shape for number, shape in enumerate(shapes)}, MIDDLE_RESIDUAL: shapes[-1]}


def unet_residuals(outputs: Iterable[str]) -> dict[str, str]:
    """Return the UNet's input for each output of a ControlNet: input -> output."""
    found = {name.replace("down_block_res_sample_", RESIDUAL): name for name in outputs}
    if (middle := "mid_block_res_sample") in found:
        found[MIDDLE_RESIDUAL] = found.pop(middle)
    return found


def block_residuals(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> dict[int, str]:
    """Return the output of a ControlNet that is added after each block of a transformer, by the block's number.

    `config` and `transformer` are their configs. Blocks that nothing is added to are left out.
    """
    kind = config.get("_class_name")
    if kind == "ZImageControlNetModel":
        return {int(block): f"{SAMPLE}{place}" for place, block in enumerate(config["control_layers_places"])}
    blocks, samples = _count(transformer, "num_layers"), _count(config, "num_layers")
    if not samples and kind != "FluxControlNetModel":
        return {}
    if kind == "SD3ControlNetModel":  # but for the last block, which makes nothing of the text
        return {block: f"{SAMPLE}{int(block / (blocks / samples))}" for block in range(blocks - 1)}
    if kind == "SanaControlNetModel":
        return {block: f"{SAMPLE}{block - 1}" for block in range(1, min(samples, blocks - 1) + 1)}
    repeats = config.get("conditioning_embedding_channels") is not None  # as XLabs' do
    found = {block: f"{SAMPLE}{place}" for block, place in enumerate(_places(blocks, samples, repeats=repeats))}
    if kind == "FluxControlNetModel":
        singles = _places(_count(transformer, "num_single_layers"), _count(config, "num_single_layers"))
        found |= {blocks + block: f"{SINGLE}{place}" for block, place in enumerate(singles)}
    return found


def blocks_of(transformer: Mapping[str, Any]) -> int:
    """Return how many blocks a transformer has, by its config; of FLUX those of two streams and of one."""
    if "n_layers" in transformer:  # of Z-Image
        return _count(transformer, "n_layers")
    singles = "num_single_layers" in transformer
    return _count(transformer, "num_layers") + (_count(transformer, "num_single_layers") if singles else 0)


_MOST = 1000
"""Blocks, or layers of a level, of any model."""


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ModelError(
            f"its config.json says {name} = {value!r}, and a ControlNet's place is counted in blocks",
            where=str(config.get("_class_name")),
            hint="Take the config.json that diffusers wrote for the model.",
        )
    return value


def _places(blocks: int, samples: int, *, repeats: bool = False) -> list[int]:
    """Return which sample each block takes: the same one for some blocks, or one after the other again and again."""
    if not samples:
        return []
    interval = math.ceil(blocks / samples)
    return [block % samples if repeats else block // interval for block in range(blocks)]
