"""From the last latents to pictures, inside a graph."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.resizing import enlarged
from ovforge_diffusion.scale import Scale
from ovforge_diffusion.single_graph.joining import constant, converted, join, part, reshaped
from ovforge_diffusion.vae import unfolded

__all__ = ["packed", "pictures"]


def packed(architecture: Architecture, latents: ov.Output, size: tuple[int, int]) -> ov.Output:
    """Return latents, (pictures, channels, height, width), as the denoiser has them; `size` is (height, width)."""
    shape = (architecture.latent_channels, *size)
    places = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    return _moved(latents, architecture.pack(places).astype(np.int64))


def pictures(
    architecture: Architecture, decoder: ov.Model, latents: ov.Output, size: tuple[int, int], asked: tuple[int, int]
) -> ov.Output:
    """Return pictures, uint8 (pictures, height, width, 3), of the denoiser's last latents, (height, width) large.

    Those that are not as large as `asked`, (width, height), are scaled and cut.
    """
    shape = architecture.packed_shape(1, *size)
    places = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    latents = _moved(latents, architecture.unpack(places, *size).astype(np.int64))
    sample = _unscaled(latents, architecture.decoding)
    if architecture.folding > 1:
        shape = (1, architecture.latent_channels, *size)
        places = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        sample = _moved(sample, unfolded(places[0], architecture.folding)[None].astype(np.int64))
    framed = decoder.inputs[0].get_partial_shape().rank.get_length() == 5  # one for videos, to which it is a frame
    seen = ops.unsqueeze(sample, constant([2])).output(0) if framed else sample
    made = converted(join(decoder, "vae_decoder", {"latent_sample": seen}).values[0], ov.Type.f32)
    made = ops.squeeze(made, constant([2])).output(0) if framed else made
    made = _filling(made, (size[1] * architecture.factor, size[0] * architecture.factor), asked)
    half = constant(np.array([0.5], np.float32))
    pixels = ops.clamp(ops.add(ops.multiply(made, half), half), 0.0, 1.0)
    whole = ops.round(ops.multiply(pixels, constant(np.array([255], np.float32))), "half_to_even")
    return ops.convert(ops.transpose(whole, constant([0, 2, 3, 1])), "u8").output(0)


def _filling(sample: ov.Output, own: tuple[int, int], asked: tuple[int, int]) -> ov.Output:
    """Return samples (pictures, channels, height, width) as `filling` of the pipeline scales and cuts them."""
    if own == asked:
        return sample
    rows, columns, top, left = enlarged(*own, *asked)
    scaled = ops.interpolate(
        sample, constant([rows, columns]), "linear_onnx", "sizes", coordinate_transformation_mode="half_pixel",
        axes=constant([2, 3]),
    ).output(0)  # fmt: skip
    return part(part(scaled, top, top + asked[1], 2), left, left + asked[0], 3)


def _moved(value: ov.Output, places: np.ndarray) -> ov.Output:
    """Return each picture's numbers at other places, (1, ...): where each comes from. Layouts are just that."""
    order = places.ravel()
    if (order == np.arange(len(order))).all() and len(places.shape) == len(value.get_partial_shape()):
        return value
    flat = reshaped(value, (-1, len(order)))
    return reshaped(ops.gather(flat, constant(order), constant(1)).output(0), (-1, *places.shape[1:]))


def _unscaled(latents: ov.Output, scale: Scale) -> ov.Output:
    """Return the autoencoder's latents of the denoiser's."""
    factor, shift = np.array([scale.factor], np.float32), np.array([scale.shift], np.float32)
    if scale.mean and scale.deviation:
        mean, deviation = (np.array(each, np.float32)[:, None, None] for each in (scale.mean, scale.deviation))
        factor, shift = factor / deviation, mean
    return ops.add(ops.divide(latents, constant(factor)), constant(shift)).output(0)
