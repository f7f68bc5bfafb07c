"""LTX-Video's autoencoder (HaCohen et al. 2024), AutoencoderKLLTXVideo: convolutions over frames, rows and columns.

Channels are normalized where they are, on their own axis: diffusers moves them to the end and back, which copies a
whole video each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import SCALE, Sizes, Submodel

__all__ = ["CLASS", "compression", "ltx_decoder", "ltx_encoder"]

CLASS = "AutoencoderKLLTXVideo"

_SMALL = 1e-8
"""What is added to mean squares of channels."""


def compression(config: Any) -> int:
    """Return how many pixels a side are one latent."""
    given = config.get("spatial_compression_ratio")
    return int(given or config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"]))


# -- the decoder --------------------------------------------------------------------------------------------------


def ltx_decoder(module: Any, latent: Sizes) -> Submodel:
    """Describe the decoder: latents [batch, channels, frames, height, width] -> a video [batch, 3, frames, ...].

    One that was trained to remove the last noise takes the timestep, [batch], from 0 to 1. One that adds noise between
    its layers takes that, too: `noise_0`, ... [draws, height, width], each for layers of one size, in their order.
    """
    decoder = module.decoder
    noisy = [(number, growth, count) for number, (growth, count) in enumerate(_draws(decoder)) if count]

    def forward(
        latent_sample: Any,
        timestep: Any = None,
        noise_0: Any = None,
        noise_1: Any = None,
        noise_2: Any = None,
        noise_3: Any = None,
        noise_4: Any = None,
    ) -> tuple[Any, ...]:
        return (_decoded(decoder, latent_sample, timestep, (noise_0, noise_1, noise_2, noise_3, noise_4)),)

    high, wide = latent.height or 4, latent.width or 4
    channels = module.config.latent_channels
    shape = (latent.batch, channels, None, latent.height, latent.width)
    ports = [Port("latent_sample", shape, (2, channels, 3, high, wide))]
    if module.config.timestep_conditioning:
        ports.append(Port("timestep", (latent.batch,), (2,)))
    for number, growth, count in noisy:
        sides = (latent.height and latent.height * growth, latent.width and latent.width * growth)
        ports.append(Port(f"noise_{number}", (count, *sides), (count, high * growth, wide * growth)))
    return Submodel(forward, tuple(ports), ("sample",), SCALE)


def _draws(decoder: Any) -> Iterator[tuple[int, int]]:
    """Yield how many times the sides of latents have grown, and how often noise is drawn, for the layers of a size."""
    growth = 1
    for block in (decoder.mid_block, *decoder.up_blocks):
        first = getattr(block, "conv_in", None)
        if first is not None and (first.scale_shift_table is not None or first.per_channel_scale1 is not None):
            raise ModelError(
                "a layer that changes the number of channels is told the time, or given noise, which none published is",
                where="vae/config.json: decoder_block_out_channels",
                hint="Take the autoencoder of one of LTX-Video 0.9.0 to 0.9.8.",
            )
        growth *= 2 if getattr(block, "upsamplers", None) else 1
        yield growth, sum(2 for layer in block.resnets if layer.per_channel_scale1 is not None)


def _decoded(decoder: Any, latents: Any, timestep: Any, noise: Sequence[Any]) -> Any:
    time = None if timestep is None else timestep * decoder.timestep_scale_multiplier
    x = _convolved(decoder.conv_in, latents)
    for drawn, block in zip_longest(noise, (decoder.mid_block, *decoder.up_blocks)):
        if block is None:
            break
        draws = None if drawn is None else iter(drawn)
        if getattr(block, "conv_in", None) is not None:
            x = _residual(block.conv_in, x)
        told = None if block.time_embedder is None else _embedded(block.time_embedder, time)
        for layer in getattr(block, "upsamplers", None) or ():
            x = _grown(layer, x)
        for layer in block.resnets:
            x = _residual(layer, x, told, draws)
    x = _normalized(x)
    if decoder.time_embedder is not None:
        shift, scale = _shifts(decoder, _embedded(decoder.time_embedder, time))
        x = x * (1 + scale) + shift
    x = _convolved(decoder.conv_out, decoder.conv_act(x))
    side, frames = decoder.patch_size, decoder.patch_size_t
    return _unfolded(x.unflatten(1, (-1, frames, side, side)).transpose(3, 4))


def _embedded(embedder: Any, time: Any) -> Any:
    """Return what layers of a size are told of the time, [batch, values]."""
    return embedder(
        timestep=time, resolution=None, aspect_ratio=None, batch_size=time.shape[0], hidden_dtype=time.dtype
    )


def _shifts(layer: Any, told: Any) -> Any:
    """Return a layer's shifts and scales in turn, each [batch, channels, 1, 1, 1]."""
    table = layer.scale_shift_table
    return (told.unflatten(1, (table.shape[0], -1)) + table)[..., None, None, None].unbind(1)


def _grown(layer: Any, x: Any) -> Any:
    """Return twice the sides and the frames, less the first frame, which came from one."""
    made = _unfolded(_convolved(layer.conv, x).unflatten(1, (-1, *layer.stride)))
    skipped = layer.stride[0] - 1
    if not layer.residual:
        return made[:, :, skipped:]
    times = math.prod(layer.stride) // layer.upscale_factor
    same = _unfolded(x.unflatten(1, (-1, *layer.stride))).repeat(1, times, 1, 1, 1)
    return (made + same)[:, :, skipped:]


def _unfolded(x: Any) -> Any:
    """Return [batch, channels, frames * t, ...] of [batch, channels, t, h, w, frames, height, width]."""
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# -- the encoder --------------------------------------------------------------------------------------------------


def ltx_encoder(module: Any, picture: Sizes, factor: int) -> Submodel:
    """Describe the encoder: a video [batch, 3, frames, height, width] -> mean and log variance of latents, stacked."""
    encoder, channels = module.encoder, module.config.in_channels

    def forward(sample: Any) -> tuple[Any, ...]:
        import torch

        side, frames = encoder.patch_size, encoder.patch_size_t
        x = _convolved(encoder.conv_in, _folded(sample, (frames, side, side)).transpose(3, 4).flatten(1, 4))
        for block in encoder.down_blocks:
            for layer in block.resnets:
                x = _residual(layer, x)
            for layer in block.downsamplers or ():
                x = _shrunk(layer, x)
            if getattr(block, "conv_out", None) is not None:
                x = _residual(block.conv_out, x)
        for layer in encoder.mid_block.resnets:
            x = _residual(layer, x)
        x = _convolved(encoder.conv_out, encoder.conv_act(_normalized(x)))
        variance = x[:, -1:].repeat(1, x.shape[1] - 2, 1, 1, 1)  # one for all channels
        return (torch.cat([x, variance], dim=1),)

    shape = (picture.batch, channels, None, picture.height, picture.width)
    example = (2, channels, 9, picture.height or 2 * factor, picture.width or 2 * factor)
    return Submodel(forward, (Port("sample", shape, example),), ("latent_parameters",), SCALE)


def _shrunk(layer: Any, x: Any) -> Any:
    """Return fewer frames, or shorter sides: by a convolution, or by folding beside means of what is folded."""
    import torch

    if not hasattr(layer, "group_size"):
        return _convolved(layer, x)
    x = torch.cat([x[:, :, : layer.stride[0] - 1], x], dim=2)
    folded = _folded(x, layer.stride).flatten(1, 4)
    means = folded.unflatten(1, (-1, layer.group_size)).mean(dim=2)
    return _folded(_convolved(layer.conv, x), layer.stride).flatten(1, 4) + means


def _folded(x: Any, stride: tuple[int, int, int]) -> Any:
    """Return [batch, channels, t, h, w, frames, height, width] of [batch, channels, frames * t, ...]."""
    frames, high, wide = stride
    split = x.unflatten(4, (-1, wide)).unflatten(3, (-1, high)).unflatten(2, (-1, frames))
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6)


# -- what both have -----------------------------------------------------------------------------------------------


def _residual(layer: Any, x: Any, told: Any = None, noise: Iterator[Any] | None = None) -> Any:
    shift, scale, inner_shift, inner_scale = (None,) * 4
    if layer.scale_shift_table is not None:
        shift, scale, inner_shift, inner_scale = _shifts(layer, told)
    inner = _part(layer, layer.conv1, x, shift, scale)
    if noise is not None:
        inner = inner + (next(noise) * layer.per_channel_scale1)[None, :, None]
    inner = _part(layer, layer.conv2, inner, inner_shift, inner_scale)
    if noise is not None:
        inner = inner + (next(noise) * layer.per_channel_scale2)[None, :, None]
    if layer.norm3 is not None:
        x = _centred(layer.norm3, x)
    return inner + (x if layer.conv_shortcut is None else _convolved(layer.conv_shortcut, x))


def _part(layer: Any, convolution: Any, x: Any, shift: Any, scale: Any) -> Any:
    x = _normalized(x)
    if scale is not None:
        x = x * (1 + scale) + shift
    return _convolved(convolution, layer.nonlinearity(x))


def _convolved(layer: Any, x: Any) -> Any:
    """Return a convolution that sees the first frame again before it, and, if it is not causal, the last one behind."""
    import torch

    missing = layer.kernel_size[0] - 1
    if missing:
        behind = 0 if layer.is_causal else missing // 2
        before = [x[:, :, :1]] * (missing - behind)
        x = torch.cat([*before, x, *[x[:, :, -1:]] * behind], dim=2)
    return layer.conv(x)


def _normalized(x: Any) -> Any:
    return x * (x.pow(2).mean(1, keepdim=True) + _SMALL).rsqrt()


def _centred(norm: Any, x: Any) -> Any:
    """Return LayerNorm over the channels."""
    x = x - x.mean(1, keepdim=True)
    x = x * (x.pow(2).mean(1, keepdim=True) + norm.eps).rsqrt()
    return x * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]
