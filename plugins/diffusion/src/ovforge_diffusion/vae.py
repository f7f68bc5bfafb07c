"""The autoencoder: pictures to latents and back, in overlapping tiles where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import RandomStream
from ovforge.errors import ModelError
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.network import not_finite
from ovforge_diffusion.resizing import filling
from ovforge_diffusion.scale import Scale

__all__ = ["Autoencoder", "Model", "pixels_of", "to_image"]

Array = NDArray[np.float32]

Model = Callable[[tuple[int, ...]], ov.CompiledModel]
"""Returns the compiled model for an input of a shape."""

_LARGE = 4 * 2**20
"""Pictures of more pixels than this are tiled where the user does not say."""

_TILE = 1024


class Autoencoder:
    """Scales latents, decodes and encodes. Every picture is its own call: a batch would only take more memory."""

    def __init__(
        self, architecture: Architecture, decoder: Model, encoder: Model, tile: int | None, preview: Model | None = None
    ) -> None:
        self._architecture, self._decoder, self._encoder = architecture, _Runner(decoder), _Runner(encoder)
        self._preview = _Runner(preview) if preview else None
        self._tile = tile

    def tile(self, height: int, width: int) -> int | None:
        """Return the side of tiles, in pixels, for a picture of this size; None if it goes as a whole."""
        side = self._tile or (_TILE if height * width > _LARGE else None)
        if side is None or max(height, width) <= side:
            return None
        return side // self._architecture.factor * self._architecture.factor

    def decode(self, latents: Array, size: tuple[int, int] | None = None) -> Image.Image:
        """Return the picture of latents, float32 (channels, height, width); scaled and cut to a (width, height)."""
        return self._decoded(latents, self._decoder, self._architecture.decoding, size)

    def preview(self, latents: Array, size: tuple[int, int] | None = None) -> Image.Image:
        """Return the picture of latents by the decoder for previews, if the pipeline has one of its own."""
        if self._preview is None or self._architecture.previewing is None:
            return self.decode(latents, size)
        return self._decoded(latents, self._preview, self._architecture.previewing, size)

    def _decoded(self, latents: Array, decoder: _Runner, scale: Scale, size: tuple[int, int] | None) -> Image.Image:
        factor, folding = self._architecture.factor, self._architecture.folding
        side = self.tile(latents.shape[1] * factor, latents.shape[2] * factor)
        factor //= folding
        sample = _tiled(unfolded(_unscaled(latents, scale), folding), decoder, side and side // factor, factor)
        if not np.isfinite(sample).all():
            raise not_finite("vae_decoder", "the decoder gave numbers that are not finite")
        return to_image(sample if size is None else filling(sample, *size))

    def encode(self, pixels: Array) -> Array:
        """Return what the encoder says of a picture, float32 (3, height, width) from -1 to 1: see `sample`."""
        factor = self._architecture.factor // self._architecture.folding
        parameters = _tiled(pixels, self._encoder, self.tile(*pixels.shape[1:]), 1 / factor, unit=factor).copy()
        if not np.isfinite(parameters).all():
            raise ModelError("the encoder gave numbers that are not finite", where="vae_encoder")
        return parameters

    def likeliest(self, parameters: Array) -> Array:
        """Return latents, (channels, height, width), without drawing: the means of what `encode` gave."""
        folding = self._architecture.folding
        means = parameters[: self._architecture.latent_channels // folding**2]
        return _scaled(_folded(means, folding), self._architecture.encoding)

    def sample(self, parameters: Sequence[Array], rng: RandomStream) -> Array:
        """Return latents, (pictures, channels, height, width), drawn from what `encode` gave for each."""
        stacked = np.stack(parameters)
        channels = self._architecture.latent_channels  # of an autoencoder whose latents are not folded
        if stacked.shape[1] == channels:  # an encoder that says one value draws nothing
            return _scaled(stacked, self._architecture.encoding)
        mean, log_variance = stacked[:, :channels], stacked[:, channels:]
        deviation = np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20))
        return _scaled(mean + deviation * rng.randn(mean.shape), self._architecture.encoding)

    def release(self) -> None:
        """Drop the requests, so that the models' memory can be freed."""
        self._decoder.release()
        self._encoder.release()
        if self._preview:
            self._preview.release()


def _scaled(latents: Array, scale: Scale) -> Array:
    """Return the denoiser's latents of the autoencoder's."""
    if scale.mean and scale.deviation:
        mean, deviation = _column(scale.mean), _column(scale.deviation)
        return ((latents - mean) * np.float32(scale.factor) / deviation).astype(np.float32)
    return (latents - np.float32(scale.shift)) * np.float32(scale.factor)


def _unscaled(latents: Array, scale: Scale) -> Array:
    """Return the autoencoder's latents of the denoiser's."""
    if scale.mean and scale.deviation:
        mean, deviation = _column(scale.mean), _column(scale.deviation)
        return (latents * deviation / np.float32(scale.factor) + mean).astype(np.float32)
    return latents / np.float32(scale.factor) + np.float32(scale.shift)


def _folded(latents: Array, side: int) -> Array:
    """Return (channels * side**2, height / side, width / side) of latents (channels, height, width)."""
    channels, height, width = latents.shape
    squares = latents.reshape(channels, height // side, side, width // side, side).transpose(0, 2, 4, 1, 3)
    return squares.reshape(channels * side**2, height // side, width // side)


def unfolded(latents: Array, side: int) -> Array:
    """Return what `_folded` made of latents."""
    channels, height, width = latents.shape
    squares = latents.reshape(channels // side**2, side, side, height, width).transpose(0, 3, 1, 4, 2)
    return squares.reshape(channels // side**2, height * side, width * side)


class _Runner:
    """Runs one model on one sample, keeping the request of the last shape. A model for videos gets one frame."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._shape: tuple[int, ...] = ()
        self._framed = False
        self._request: ov.InferRequest | None = None

    def __call__(self, sample: Array) -> Array:
        batch = np.ascontiguousarray(sample[None], np.float32)
        if self._request is None or self._shape != batch.shape:
            model = self._model(batch.shape)
            self._request, self._shape = model.create_infer_request(), batch.shape
            self._framed = model.input(0).get_partial_shape().rank.get_length() == batch.ndim + 1
        self._request.infer({0: batch[:, :, None] if self._framed else batch})
        result: Array = self._request.get_output_tensor(0).data[0]
        return result[:, 0] if self._framed else result

    def release(self) -> None:
        self._request = None


def _tiled(sample: Array, run: Callable[[Array], Array], side: int | None, factor: float, unit: int = 1) -> Array:
    """Run a model that makes `factor` values of one on a sample (channels, height, width), whole or tile by tile.

    Tiles begin at multiples of `unit`, have one size, overlap by a quarter or more and fade into each other linearly,
    so that no border shows.
    """
    if side is None:
        return run(sample)
    _, height, width = sample.shape
    total: Array | None = None
    weights = np.zeros((int(height * factor), int(width * factor)), np.float32)
    for top in _starts(height, side, unit):
        for left in _starts(width, side, unit):
            part = run(sample[:, top : top + side, left : left + side])
            if total is None:
                total = np.zeros((len(part), *weights.shape), np.float32)
            rows, columns = part.shape[1:]
            fade = np.outer(_fade(rows, top > 0, top + side < height), _fade(columns, left > 0, left + side < width))
            y, x = int(top * factor), int(left * factor)
            total[:, y : y + rows, x : x + columns] += part * fade
            weights[y : y + rows, x : x + columns] += fade
    assert total is not None
    total /= weights
    return total


def _starts(length: int, side: int, unit: int) -> Iterator[int]:
    """Give where tiles begin: evenly, overlapping by a quarter at least."""
    if length <= side:
        yield 0
        return
    count = -(-(length - side) // (side - side // 4)) + 1
    for number in range(count):
        yield round(number * (length - side) / (count - 1) / unit) * unit


def _fade(length: int, before: bool, after: bool) -> Array:
    """Return weights along a side: rising and falling over a quarter, if there is a neighbour."""
    quarter = max(length // 4, 1)
    ramp = (np.arange(quarter, dtype=np.float32) + np.float32(0.5)) / np.float32(quarter)
    weights = np.ones(length, np.float32)
    if before:
        weights[:quarter] = ramp
    if after:
        weights[-quarter:] = np.minimum(weights[-quarter:], ramp[::-1])
    return weights


def _column(numbers: Sequence[float]) -> Array:
    return np.array(numbers, np.float32)[:, None, None]


def pixels_of(image: Image.Image) -> Array:
    """Return an RGB picture as float32 (3, height, width) from -1 to 1."""
    values = np.asarray(image, np.float32) / np.float32(255.0)
    return np.ascontiguousarray(values.transpose(2, 0, 1)) * np.float32(2.0) - np.float32(1.0)


def to_image(sample: Array) -> Image.Image:
    """Return the picture of a sample, float32 (3, height, width), clipped to -1 to 1."""
    pixels = np.clip(sample.transpose(1, 2, 0) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))
