"""The autoencoder of videos: latents to frames and frames to latents, in overlapping tiles if they are many.

Tiles are those of diffusers' AutoencoderKLLTXVideo: where they lie, how they fade into each other, and in which order
they draw noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.contracts import RandomStream
from ovforge.errors import InputError, ModelError
from ovforge.model import Generator
from ovforge_diffusion.architectures.ltx import LTXAutoencoder
from ovforge_diffusion.network import not_finite
from ovforge_diffusion.scale import Scale
from ovforge_diffusion.video.result import Frames

if TYPE_CHECKING:
    from ovforge_diffusion.video.inputs import UpsampleVideoOptions, VideoOptions

__all__ = ["Tiles", "decode", "drawn", "encode", "normalized", "tiles_of"]

Array = NDArray[np.float32]

_LARGE = 20 * 10**6
"""Videos of more pixels than this, in all of their frames, are tiled where the user does not say."""

_SIDE, _FRAMES = 512, 64
"""Pixels and frames of tiles then."""


@dataclass(frozen=True)
class Tiles:
    """Pixels a side and frames of tiles, None for a whole; and of which size a latent is."""

    side: int | None
    frames: int | None
    factor: int
    frame_factor: int

    def __str__(self) -> str:
        sides = f"{self.side}x{self.side} pixels" if self.side else ""
        frames = f"{self.frames} frames" if self.frames else ""
        return " and ".join(filter(None, (sides, frames)))


def tiles_of(
    shape: tuple[int, ...], autoencoder: LTXAutoencoder, options: VideoOptions | UpsampleVideoOptions
) -> Tiles | None:
    """Return the tiles of a video of `shape` (frames, height, width), by what the user says; None if it goes whole."""
    large = int(np.prod(shape)) > _LARGE
    side, frames = options.tile or (_SIDE if large else None), options.tile_frames or (_FRAMES if large else None)
    factor, frame_factor = autoencoder.factor, autoencoder.frame_factor
    tiles = Tiles(
        side // factor * factor if side and max(shape[1:]) > side else None,
        frames // frame_factor * frame_factor if frames and shape[0] > frames else None,
        factor,
        frame_factor,
    )
    return tiles if tiles.side or tiles.frames else None


def decode(model: ov.CompiledModel, latents: Array, tiles: Tiles | None, timestep: float | None, seed: int) -> Frames:
    """Return the video of latents, float32 (channels, frames, height, width), of the autoencoder's own scale.

    `timestep` is told to a decoder that takes one, and one that adds noise between its layers draws it from `seed`, as
    diffusers does after torch.manual_seed(seed).
    """
    run = _Decoder(model, timestep, seed)
    parts = [run(latents)] if tiles is None else _in_time(latents, run, tiles, decoding=True)
    return np.concatenate([_frames(part) for part in parts])


def normalized(latents: Array, scale: Scale, *, back: bool = False) -> Array:
    """Return the denoiser's latents, (..., channels, frames, height, width), of the autoencoder's, or `back`."""
    mean, deviation = (
        np.array(values or (default,), np.float32)[:, None, None, None]
        for values, default in ((scale.mean, 0), (scale.deviation, 1))
    )
    factor = np.float32(scale.factor)
    return latents * deviation / factor + mean if back else (latents - mean) * factor / deviation


def encode(
    model: ov.CompiledModel, pixels: Array, autoencoder: LTXAutoencoder, options: VideoOptions | UpsampleVideoOptions
) -> Array:
    """Return mean and log variance of latents, stacked, (channels * 2, frames, height, width), of a video.

    `pixels` are float32 (3, frames, height, width) from -1 to 1; many of them go in tiles.
    """
    request, tiles = model.create_infer_request(), tiles_of(pixels.shape[1:], autoencoder, options)

    def run(part: Array) -> Array:
        request.infer({0: np.ascontiguousarray(part[None])})
        parameters: Array = request.get_output_tensor(0).data[0]
        return parameters.copy()

    parts = [run(pixels)] if tiles is None else [*_in_time(pixels, run, tiles, decoding=False)]
    parameters = np.concatenate(parts, axis=1)
    if not np.isfinite(parameters).all():
        raise ModelError("the encoder gave numbers that are not finite", where="vae_encoder")
    return parameters


def drawn(parameters: Array, rng: RandomStream) -> Array:
    """Return latents drawn from what `encode` gave for each video, (videos, channels * 2, frames, height, width)."""
    mean, log_variance = np.split(parameters, 2, axis=1)
    deviation: Array = np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20))
    return mean + deviation * rng.randn(mean.shape)


class _Decoder:
    """Runs the decoder on latents (channels, frames, height, width): a sample (3, frames, height, width)."""

    def __init__(self, model: ov.CompiledModel, timestep: float | None, seed: int) -> None:
        self._request = model.create_infer_request()
        self._ports = {name: port for port in model.inputs for name in port.names}
        self._timestep, self._noise = timestep, Generator(seed)
        if timestep is not None:
            self._check_timestep(timestep)

    def __call__(self, latents: Array) -> Array:
        given: dict[ov.Output, NDArray[np.generic]] = {
            self._ports["latent_sample"]: np.ascontiguousarray(latents[None])
        }
        if self._timestep is not None:
            port = self._ports["timestep"]
            given[port] = np.array([self._timestep], port.get_element_type().to_dtype())
        given |= self._noises(latents.shape[2:])
        self._request.infer(given)
        sample: Array = self._request.get_output_tensor(0).data[0]
        if not np.isfinite(sample).all():
            raise not_finite("vae_decoder", "the decoder gave numbers that are not finite")
        return sample.copy()

    def _noises(self, sides: tuple[int, ...]) -> Iterator[tuple[ov.Output, Array]]:
        """Yield noise for layers of each size, which is twice the one before, in the order in which they run."""
        for name in sorted(name for name in self._ports if name.startswith("noise_")):
            port, growth = self._ports[name], 2 ** int(name.removeprefix("noise_"))
            draws = port.get_partial_shape()[0].get_length()
            yield port, np.stack([self._noise.randn([side * growth for side in sides]) for _ in range(draws)])

    def _check_timestep(self, timestep: float) -> None:
        if "timestep" not in self._ports:
            raise ModelError(
                "its config says that it takes a timestep, and it has no such input",
                where="vae_decoder",
                hint="Convert the model again, with ovforge or optimum-intel.",
            )
        kind = self._ports["timestep"].get_element_type()
        if kind.is_integral() and timestep % 1:
            raise InputError(
                f"{timestep:g} is a fraction, and the decoder takes {kind.get_type_name()}",
                where="decode_timestep",
                hint="Convert the model with ovforge, or leave it out.",
            )


# -- tiles --------------------------------------------------------------------------------------------------------


def _in_time(values: Array, run: Callable[[Array], Array], tiles: Tiles, *, decoding: bool) -> Iterator[Array]:
    """Yield what is made of a video's parts, one after the other: parts overlap by one frame more than they fade."""
    if tiles.frames is None:
        yield _in_space(values, run, tiles, decoding=decoding)
        return
    ways = _Way.of(tiles.frames, tiles.frame_factor, decoding=decoding)
    before: Array | None = None
    for begin in range(0, values.shape[1], ways.step):
        part = _in_space(values[:, begin : begin + ways.size + 1], run, tiles, decoding=decoding)
        if before is None:
            kept = ways.kept + 1
        else:
            part, kept = part[:, :-1] if decoding else part[:, 1:], ways.kept
            _fade(before, part, ways.fading, axis=1)
        yield part[:, :kept]
        before = part


def _in_space(values: Array, run: Callable[[Array], Array], tiles: Tiles, *, decoding: bool) -> Array:
    """Return what is made of a video, tile by tile: each fades into the one above it, and then into the one beside."""
    high, wide = values.shape[2:]
    ways = None if tiles.side is None else _Way.of(tiles.side, tiles.factor, decoding=decoding)
    if ways is None or max(high, wide) <= ways.size:
        return run(values)
    rows: list[Array] = []
    above: list[Array] = []
    for top in range(0, high, ways.step):
        row: list[Array] = []
        for left in range(0, wide, ways.step):
            tile = run(values[:, :, top : top + ways.size, left : left + ways.size])
            if above:
                _fade(above[len(row)], tile, ways.fading, axis=2)
            if row:
                _fade(row[-1], tile, ways.fading, axis=3)
            row.append(tile)
        rows.append(np.concatenate([tile[:, :, : ways.kept, : ways.kept] for tile in row], axis=3))
        above = row
    return np.concatenate(rows, axis=2)


@dataclass(frozen=True)
class _Way:
    """Lengths along an axis: of a tile, from one to the next, and of what is kept and fades of what is made of it."""

    size: int
    step: int
    kept: int
    fading: int

    @classmethod
    def of(cls, size: int, factor: int, *, decoding: bool) -> _Way:
        """Return those of tiles of so many pixels, or frames, a latent being `factor` of them."""
        stride = _stride(size, factor)
        if decoding:
            return cls(size // factor, stride // factor, stride, size - stride)
        return cls(size, stride, stride // factor, (size - stride) // factor)


def _stride(size: int, factor: int) -> int:
    """Return how far tiles are apart: seven eighths of their size, as diffusers' usual 448 of 512."""
    return max(size * 7 // 8 // factor * factor, factor)


def _fade(before: Array, part: Array, extent: int, axis: int) -> None:
    """Let the begin of `part` come out of the end of what is before it, in place."""
    extent = min(before.shape[axis], part.shape[axis], extent)
    if not extent:
        return
    weights = (np.arange(extent) / extent).astype(np.float32)
    rest = (1 - np.arange(extent) / extent).astype(np.float32)
    shape = [extent if n == axis else 1 for n in range(part.ndim)]
    begin = tuple(slice(extent) if n == axis else slice(None) for n in range(part.ndim))
    end = tuple(slice(-extent, None) if n == axis else slice(None) for n in range(part.ndim))
    part[begin] = before[end] * rest.reshape(shape) + part[begin] * weights.reshape(shape)


def _frames(sample: Array) -> Frames:
    """Return the frames of a sample (3, frames, height, width), clipped to -1 to 1."""
    made = np.empty((*sample.shape[1:], 3), np.uint8)
    for number in range(len(made)):
        pixels = np.clip(sample[:, number].transpose(1, 2, 0) * np.float32(0.5) + np.float32(0.5), 0, 1)
        made[number] = (pixels * 255).round().astype(np.uint8)
    return made
