"""upsample-video: larger latents, or latents of more frames, by LTX-Video's upsampler (LTXLatentUpsamplePipeline)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Progress, TaskContext, ignore_progress
from ovforge.errors import InputError, ModelError
from ovforge.model import BatchGenerator, Timings
from ovforge_diffusion.architectures.ltx import LTXAutoencoder
from ovforge_diffusion.examples import drawing
from ovforge_diffusion.latents import open_latents
from ovforge_diffusion.request import check_side, seeds_of
from ovforge_diffusion.scale import Scale
from ovforge_diffusion.video.autoencoder import drawn, encode, normalized
from ovforge_diffusion.video.ending import Ending, check_ending
from ovforge_diffusion.video.inputs import UpsampleVideoInputs, UpsampleVideoOptions
from ovforge_diffusion.video.reading import clip_name, read_footage
from ovforge_diffusion.video.result import VideosResult
from ovforge_diffusion.video.upsampler import Upsampler

__all__ = ["UpsampleVideo"]

Array = NDArray[np.float32]

_DECODER, _ENCODER = "vae_decoder", "vae_encoder"
_CLASS = "AutoencoderKLLTXVideo"
_EXAMPLE = 128, 9
"""Pixels a side, and frames, of examples."""


class UpsampleVideo:
    """Enlarges videos, or latents for video-to-video to refine; calls are served one at a time."""

    def __init__(self, options: UpsampleVideoOptions, context: TaskContext) -> None:
        self._options, self._bundle = options, context.bundle
        self._lock = threading.Lock()
        config = context.bundle.configs.get(_DECODER, {})
        if config.get("_class_name") != _CLASS:
            raise ModelError(
                f"its class {config.get('_class_name')!r} is not that of LTX-Video's autoencoder, {_CLASS}",
                where=f"{_DECODER}/config.json",
                hint="Take LTX-Video, or what its upsampler is published with.",
            )
        self._autoencoder, self._scale = LTXAutoencoder.of(config), Scale.of(config)
        self._upsampler = Upsampler(context.bundle, self._autoencoder, self._scale, low_memory=options.low_memory)
        self._bundle.on_demand()
        self._upsampler.start()
        if not options.low_memory:
            self._bundle.start(_DECODER)

    def __call__(
        self, inputs: UpsampleVideoInputs, progress: Callable[[Progress], None] = ignore_progress
    ) -> VideosResult:
        """Return videos of twice the sides, or of 2n - 1 frames for n, and their latents.

        Raises InputError for what cannot be read or has no effect, ModelError for numbers that are not finite. What the
        progress callback raises ends the run.
        """
        with self._lock:
            try:
                return self._made(inputs, progress)
            except BaseException:
                for role in self._bundle:
                    self._release(role)
                raise

    def examples(self, count: int) -> Sequence[UpsampleVideoInputs]:
        """Return small videos of drawn pictures that move to the left."""
        side, frames = _EXAMPLE
        wide = (np.asarray(drawing(number, side + frames)) for number in range(count))
        return [
            UpsampleVideoInputs(video=np.stack([each[:side, n : n + side] for n in range(frames)]), seed=number)
            for number, each in enumerate(wide)
        ]

    def _made(self, inputs: UpsampleVideoInputs, progress: Callable[[Progress], None]) -> VideosResult:
        check_ending(inputs, self._autoencoder, decodes=inputs.decode)
        if (inputs.video is None) == (inputs.latents is None):
            raise InputError(
                "there is nothing to enlarge, or too much", where="video, latents", hint="Give one of them."
            )
        timings, notes = Timings(), list[str]()
        given = None if inputs.latents is None else self._latents(inputs, inputs.latents)
        seeds = seeds_of(inputs.seed, 1 if given is None else len(given))
        rng = BatchGenerator(seeds)
        latents, rate = (given, None) if given is not None else self._encoded(inputs, rng, timings, notes)
        if rate and self._upsampler.doubles_frames:
            rate *= 2  # it takes as long as before
        seen = self._upsampler(latents, inputs.adain_factor, inputs.tone_map_compression_ratio, timings, progress)
        result = VideosResult(
            frame_rate=inputs.frame_rate or rate or 25.0, seeds=seeds, latents=normalized(seen, self._scale),
            timings=timings, warnings=notes, provenance={"inputs": _written(inputs, seeds)},
        )  # fmt: skip
        if inputs.decode:
            ending = Ending(self._autoencoder, inputs.decode_timestep, inputs.decode_noise_scale, self._options)
            ending.make(result, seen, lambda: self._bundle[_DECODER], rng, timings, progress)
            self._release(_DECODER)
        return result

    def _latents(self, inputs: UpsampleVideoInputs, value: Any) -> Array:
        """Return the latents that are given, (videos, channels, frames, height, width)."""
        if inputs.width or inputs.height:
            raise InputError("latents have their size", where="width, height", hint="Leave them out.")
        latents = open_latents(value)
        latents = latents[None] if latents.ndim == 4 else latents
        channels = self._autoencoder.channels
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.size:
            raise InputError(
                f"latents of shape {latents.shape}",
                where="latents",
                hint=f"Expected (videos, {channels}, frames, rows, columns), which a video task writes as .npy.",
            )
        return np.ascontiguousarray(latents, np.float32)

    def _encoded(
        self, inputs: UpsampleVideoInputs, rng: BatchGenerator, timings: Timings, notes: list[str]
    ) -> tuple[Array, float | None]:
        """Return latents of the video, (1, channels, frames, height, width), of the denoiser's scale, and its rate."""
        if _ENCODER not in self._bundle:
            raise ModelError(
                "the model has none, and it makes the latents of the video",
                where=_ENCODER,
                hint="Bring one of the same model by [load.parts]: vae_encoder = FOLDER, or give latents.",
            )
        sides, factor = (inputs.width, inputs.height), self._autoencoder.factor
        for name, side in zip(("width", "height"), sides, strict=True):
            if side is None and any(sides):
                raise InputError("is missing", where=name, hint="Give width and height, or neither.")
            if side is not None:
                check_side(name, side, factor)
        size = (inputs.width, inputs.height) if inputs.width and inputs.height else None
        assert inputs.video is not None
        with timings.span("vae_encoder"):
            footage = read_footage(inputs.video, "video", size, self._autoencoder.frame_factor, notes)
            parameters = encode(self._bundle[_ENCODER], footage.pixels, self._autoencoder, self._options)[None]
        self._release(_ENCODER)
        return normalized(drawn(parameters, rng), replace(self._scale, factor=1.0)), footage.rate

    def _release(self, role: str) -> None:
        if self._options.low_memory:
            self._bundle.release(role)


def _written(inputs: UpsampleVideoInputs, seeds: Sequence[int]) -> dict[str, Any]:
    """Return inputs that make the same again."""
    given = {name: value for name in inputs.model_fields_set if (value := getattr(inputs, name)) is not None}
    given |= {name: clip_name(given[name]) for name in ("video", "latents") if name in given}
    return given | {"seed": seeds[0] if len(seeds) == 1 else list(seeds)}
