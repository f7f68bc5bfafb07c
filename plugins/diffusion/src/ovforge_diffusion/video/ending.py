"""The end of a run: latents become videos, with the last noise for decoders that take it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.contracts import Progress, RandomStream
from ovforge.errors import InputError
from ovforge.model import Timings
from ovforge_diffusion.architectures.ltx import LTXAutoencoder
from ovforge_diffusion.video.autoencoder import decode, tiles_of
from ovforge_diffusion.video.inputs import UpsampleVideoOptions, VideoOptions
from ovforge_diffusion.video.result import VideosResult

__all__ = ["Ending", "check_ending"]


def check_ending(inputs: Any, autoencoder: LTXAutoencoder, *, decodes: bool) -> None:
    """Raise InputError for options of decoding in a task's inputs that would have no effect."""
    for name in ("decode_timestep", "decode_noise_scale"):
        if getattr(inputs, name) is not None and not (decodes and autoencoder.denoises_last):
            why = "the model's decoder takes no timestep" if decodes else "nothing is decoded"
            raise InputError(f"no effect: {why}", where=name, hint="Leave it out.")


@dataclass(frozen=True)
class Ending:
    """How videos are decoded. `timestep` and `noise_scale` are for decoders that are told a time."""

    autoencoder: LTXAutoencoder
    timestep: float | None
    noise_scale: float | None
    options: VideoOptions | UpsampleVideoOptions

    def make(
        self,
        result: VideosResult,
        latents: NDArray[np.float32],
        decoder: Callable[[], ov.CompiledModel],
        rng: RandomStream,
        timings: Timings,
        progress: Callable[[Progress], None],
    ) -> None:
        """Give a result its videos, of the autoencoder's latents (videos, channels, frames, height, width)."""
        timestep = (self.timestep or 0.0) if self.autoencoder.denoises_last else None
        share = np.float32(timestep or 0.0 if self.noise_scale is None else self.noise_scale)
        if share:
            latents = (1 - share) * latents + share * rng.randn(latents.shape)
        factor, frame_factor = self.autoencoder.factor, self.autoencoder.frame_factor
        frames, height, width = latents.shape[2:]
        shape = ((frames - 1) * frame_factor + 1, height * factor, width * factor)
        tiles = tiles_of(shape, self.autoencoder, self.options)
        if tiles is not None:
            result.warnings.append(f"decoded in overlapping tiles of {tiles}, as enable_tiling of diffusers does")
        progress(Progress("decoding", 0, len(latents)))
        made = []
        for row, seed in zip(latents, result.seeds, strict=True):
            with timings.span("vae_decoder"):
                made.append(decode(decoder(), row, tiles, timestep, seed))
            progress(Progress("decoding", len(made), len(latents)))
        result.videos = made
