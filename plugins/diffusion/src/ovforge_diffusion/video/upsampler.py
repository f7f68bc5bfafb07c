"""LTX-Video's latent upsampler (LTXLatentUpsamplePipeline of diffusers): larger latents, or latents of more frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, Progress
from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge_diffusion.architectures.ltx import LTXAutoencoder
from ovforge_diffusion.network import not_finite
from ovforge_diffusion.scale import Scale
from ovforge_diffusion.video.autoencoder import normalized

__all__ = ["UPSAMPLER", "Upsampler"]

Array = NDArray[np.float32]

UPSAMPLER = "latent_upsampler"
"""The role of its model."""


class Upsampler:
    """The latent upsampler of a pipeline; `scale` is that of the denoiser's latents.

    Raises ModelError if it is not for the latents of the autoencoder.
    """

    def __init__(self, bundle: CompiledModels, autoencoder: LTXAutoencoder, scale: Scale, *, low_memory: bool) -> None:
        self._bundle, self._scale, self._low_memory = bundle, scale, low_memory
        self._config = bundle.configs.get(UPSAMPLER, {})
        channels = self._config.get("in_channels", 128)
        if channels != autoencoder.channels:
            raise ModelError(
                f"it takes {channels} channels, and the autoencoder has {autoencoder.channels}",
                where=f"{UPSAMPLER}/config.json",
                hint="Take the upsampler of the same model.",
            )

    def start(self) -> None:
        """Begin to compile it, unless memory is to stay low."""
        if not self._low_memory:
            self._bundle.start(UPSAMPLER)

    @property
    def doubles_sides(self) -> bool:
        """Whether what it makes has twice the sides."""
        return bool(self._config.get("spatial_upsample", True))

    @property
    def doubles_frames(self) -> bool:
        """Whether it puts a latent between any two, so that n frames become 2n - 1."""
        return bool(self._config.get("temporal_upsample", False))

    def __call__(
        self,
        latents: Array,
        adain_factor: float,
        compression: float,
        timings: Timings,
        progress: Callable[[Progress], None],
    ) -> Array:
        """Return larger latents, of the autoencoder's scale, of those of the denoiser's.

        Both are float32 (videos, channels, frames, height, width); each video is a call of its own. Raises InputError
        for a factor that has no meaning for one latent, ModelError for numbers that are not finite.
        """
        if adain_factor and latents[0, 0].size < 2:
            raise InputError("one latent has no deviation", where="adain_factor", hint="Leave it out.")
        progress(Progress("upsampling", 0, len(latents)))
        request = self._bundle[UPSAMPLER].create_infer_request()
        made = []
        for row in normalized(latents, self._scale, back=True):
            with timings.span(UPSAMPLER):
                request.infer({0: np.ascontiguousarray(row[None])})
            large = request.get_output_tensor(0).data[0].astype(np.float32)
            if adain_factor:
                large = _adapted(large, row, adain_factor)
            if compression:
                large = _tone_mapped(large, compression)
            if not np.isfinite(large).all():
                raise not_finite(UPSAMPLER)
            made.append(large)
            progress(Progress("upsampling", len(made), len(latents)))
        if self._low_memory:
            self._bundle.release(UPSAMPLER)
        return np.stack(made)


def _adapted(latents: Array, reference: Array, factor: float) -> Array:
    """Return latents, (channels, frames, height, width), with the mean and deviation of each channel of `reference`.

    A `factor` of 1 gives them wholly, 0 not at all (adaptive instance normalization, Huang and Belongie 2017).
    """
    axes = (1, 2, 3)
    mean, deviation = latents.mean(axes, keepdims=True), latents.std(axes, ddof=1, keepdims=True)
    wanted, spread = reference.mean(axes, keepdims=True), reference.std(axes, ddof=1, keepdims=True)
    adapted: Array = (latents - mean) / deviation * spread + wanted
    return latents + np.float32(factor) * (adapted - latents)


def _tone_mapped(latents: Array, compression: float) -> Array:
    """Return latents of which large ones are made smaller: by up to 0.6 of them for a `compression` of 1."""
    strength = np.float32(compression * 0.75)
    share = 1 / (1 + np.exp(np.float32(-4) * strength * (np.abs(latents) - 1)))
    return (latents * (1 - np.float32(0.8) * strength * share)).astype(np.float32)
