"""text-to-video, image-to-video and video-to-video: a run as for pictures, of latents that have frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import Progress, Sampling, TaskContext
from ovforge.errors import InputError
from ovforge.model import BatchGenerator, Timings, picture_name
from ovforge_diffusion.architectures.base import Task
from ovforge_diffusion.architectures.ltx import LTXVideo
from ovforge_diffusion.diffusion import Diffusion, Start
from ovforge_diffusion.examples import drawing, prompts
from ovforge_diffusion.graph.video_places import PLACES
from ovforge_diffusion.latents import read_latents
from ovforge_diffusion.request import Request, Video, check_side
from ovforge_diffusion.resizing import resized
from ovforge_diffusion.vae import pixels_of
from ovforge_diffusion.video.autoencoder import decode, drawn, encode, normalized
from ovforge_diffusion.video.conditions import Conditions
from ovforge_diffusion.video.ending import Ending, check_ending
from ovforge_diffusion.video.inputs import (
    ImageToVideoInputs,
    TextToVideoInputs,
    Upscale,
    VideoCondition,
    VideoOptions,
    VideoToVideoInputs,
)
from ovforge_diffusion.video.reading import clip_name, read_footage
from ovforge_diffusion.video.result import VideosResult
from ovforge_diffusion.video.upsampler import UPSAMPLER, Upsampler

__all__ = ["ImageToVideo", "TextToVideo", "VideoToVideo"]

Array = NDArray[np.float32]

_EXAMPLE: dict[str, int] = {"num_frames": 25, "width": 384, "height": 256}
"""What examples are of: a second of a small video. Attention takes 13 times as long for one of the usual size, and a
calibration has 300 steps and more."""


class TextToVideo(Diffusion):
    """From noise."""

    name: ClassVar[Task] = "text-to-video"
    architecture: LTXVideo
    _options: VideoOptions

    def examples(self, count: int) -> Sequence[TextToVideoInputs]:
        """Return the shipped prompts, for small videos."""
        return [TextToVideoInputs(prompt=text, seed=n, **_EXAMPLE) for n, text in prompts(count)]

    def _requested(self, inputs: Any) -> tuple[Request, dict[str, float]]:
        request, adapters = super()._requested(inputs.shared())
        frames, unit = inputs.num_frames, self.architecture.frame_factor * self._every(inputs)
        if (frames - 1) % unit:
            lower = (frames - 1) // unit * unit + 1
            raise InputError(
                f"{frames} is not one more than a multiple of {unit}",
                where="num_frames",
                hint=f"The nearest numbers are {lower} and {lower + unit}.",
            )
        check_ending(inputs, self.architecture.autoencoder, decodes=request.decode)
        video = Video(frames, inputs.frame_rate, inputs.decode_timestep, inputs.decode_noise_scale)
        return replace(request, video=video), adapters

    def _every(self, inputs: Any) -> int:
        """Return 2 if a first run makes each second frame alone, else 1."""
        return 1

    def _as_inputs(self, inputs: Any, request: Request) -> dict[str, Any]:
        given = {name: getattr(inputs, name) for name in ("decode_timestep", "decode_noise_scale")}
        made = {**request.as_inputs(), "num_frames": inputs.num_frames, "frame_rate": inputs.frame_rate}
        return made | {name: value for name, value in given.items() if value is not None}

    def _size(self, request: Request) -> tuple[int, ...]:
        assert request.video is not None
        return self.architecture.frames(request.video.frames), *super()._size(request)

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        noise = self._noise(request, rng) * np.float32(sampling.init_noise_sigma)
        return Start(self.architecture.pack(noise))

    def _noise(self, request: Request, rng: BatchGenerator) -> Array:
        """Return the first noise: the user's own, or drawn."""
        shape, given = self.latents_shape(request), request.given.latents
        return rng.randn(shape) if given is None else read_latents(given, shape)

    def _result(
        self,
        latents: Array,
        request: Request,
        start: Start,
        rng: BatchGenerator,
        timings: Timings,
        progress: Callable[[Progress], None],
    ) -> VideosResult:
        video = request.video
        assert video is not None
        result = VideosResult(frame_rate=video.rate, seeds=request.seeds, latents=latents)
        if not request.decode:
            return result
        ending = Ending(self.architecture.autoencoder, video.decode_timestep, video.decode_noise_scale, self._options)
        seen = normalized(latents, self.architecture.decoding, back=True)
        ending.make(result, seen, lambda: self._models.any_size("vae_decoder"), rng, timings, progress)
        return result

    def _encode_whole(self, pixels: Array) -> Array:
        """Return what the encoder gives for pixels, (channels * 2, frames, height, width)."""
        return encode(self._models.any_size("vae_encoder"), pixels, self.architecture.autoencoder, self._options)

    def _preview(self, request: Request, sampling: Sampling, latents: Array, index: int) -> list[Image.Image]:
        """Return the middle latent of each video, decoded as if it were alone."""
        seen = self._foreseen(request, sampling, latents, index)
        rows = normalized(seen, self.architecture.decoding, back=True)
        middle = rows.shape[2] // 2
        timestep = 0.0 if self.architecture.autoencoder.denoises_last else None
        decoder = self._models.any_size("vae_decoder")
        return [
            Image.fromarray(decode(decoder, row[:, middle : middle + 1], None, timestep, seed)[0])
            for row, seed in zip(rows, request.seeds, strict=True)
        ]


class ImageToVideo(TextToVideo):
    """From noise and the first frame, which the transformer is told to be without noise at any time."""

    name = "image-to-video"
    encodes = True

    def examples(self, count: int) -> Sequence[Any]:
        """Return the shipped prompts with drawn pictures."""
        size = _EXAMPLE["width"]
        return [
            ImageToVideoInputs(prompt=text, seed=n, image=[drawing(n, size)], **_EXAMPLE) for n, text in prompts(count)
        ]

    def _as_inputs(self, inputs: Any, request: Request) -> dict[str, Any]:
        return {**super()._as_inputs(inputs, request), "image": [picture_name(image) for image in inputs.image]}

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        pack = self.architecture.pack
        with timings.span("vae_encoder"):
            first = self._encoded(inputs.image, request, rng)
        noise = self._noise(request, rng)
        noise[:, :, :1] = first
        tokens = first.shape[3] * first.shape[4]
        given = pack(first)
        still = np.zeros(noise[0, 0].size, np.float32)
        still[:tokens] = 1

        def kept(latents: Array, index: int) -> Array:
            latents[:, :tokens] = given
            return latents

        return Start(pack(noise), blend=kept, still=still)

    def _encoded(self, images: list[Any], request: Request, rng: BatchGenerator) -> Array:
        """Return latents of each video's first frame, (videos, channels, 1, height, width)."""
        videos, size = len(request.prompts), (request.width, request.height)
        each = [self._encode_whole(pixels_of(resized(image, "image", *size))[:, None]) for image in images]
        prompts = videos // request.given.count
        if len(each) not in (1, prompts):
            raise InputError(f"{len(each)} pictures for {prompts} prompts", where="image", hint="Give one for each.")
        rows = [row for row in (each * prompts if len(each) == 1 else each) for _ in range(request.given.count)]
        return normalized(drawn(np.stack(rows), rng), replace(self.architecture.encoding, factor=1.0))


class VideoToVideo(TextToVideo):
    """From noise, or a noised video, and from pictures and videos at some frames, whose tokens have less noise."""

    name = "video-to-video"
    encodes = True

    def __init__(self, options: VideoOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self._upsampler: Upsampler | None = None
        if UPSAMPLER in context.bundle:
            autoencoder, scale = self.architecture.autoencoder, self.architecture.decoding
            self._upsampler = Upsampler(context.bundle, autoencoder, scale, low_memory=options.low_memory)
            if context.inputs.get("upscale") is not None:
                self._upsampler.start()

    def examples(self, count: int) -> Sequence[Any]:
        """Return the shipped prompts with drawn pictures."""
        size = _EXAMPLE["width"]
        return [
            VideoToVideoInputs(prompt=text, seed=n, conditions=[VideoCondition(image=drawing(n, size))], **_EXAMPLE)
            for n, text in prompts(count)
        ]

    def _requested(self, inputs: Any) -> tuple[Request, dict[str, float]]:
        request, adapters = super()._requested(inputs)
        if inputs.video is not None and inputs.latents is not None:
            raise InputError("given beside a video", where="latents", hint="Start from one of them.")
        changes = inputs.video is not None or inputs.latents is not None
        if inputs.strength is not None and not changes:
            raise InputError(
                "there is nothing to change", where="strength", hint="Give video or latents, or leave it out."
            )
        if "image_cond_noise_scale" in inputs.model_fields_set and not inputs.conditions:
            raise InputError("there are no conditions", where="image_cond_noise_scale", hint="Leave it out.")
        for number, condition in enumerate(inputs.conditions or ()):
            self._check_frame(condition, f"conditions.{number}.frame_index", inputs.num_frames, self._every(inputs))
        strength = self.architecture.defaults.strength if inputs.strength is None else inputs.strength
        return replace(request, strength=strength if changes else 1.0), adapters

    def _made(self, inputs: Any, request: Request, progress: Callable[[Progress], None]) -> VideosResult:
        if inputs.upscale is None:
            made: VideosResult = super()._made(inputs, request, progress)
            return made
        return self._upscaled(inputs, request, progress)

    def _upscaled(self, inputs: Any, request: Request, progress: Callable[[Progress], None]) -> VideosResult:
        """Return a video that is made small, enlarged and refined: what three calls give, of which the last is it."""
        upsampler, timings, scale = self._upsampler_for(request), Timings(), self.architecture.decoding
        size, seeds, upscale = (request.width, request.height), request.seeds, inputs.upscale
        every, side = self._every(inputs), 2 if upsampler.doubles_sides else 1
        small = inputs.small((size[0] // side, size[1] // side), every, seeds)
        begun = self._requested(small)[0]
        assert begun.video is not None
        begun = replace(begun, video=replace(begun.video, every=every))
        refining = inputs.refining(size, seeds, np.zeros(self.latents_shape(request), np.float32))
        first, second = self._read([begun, self._refined(refining)], timings, progress)
        low = self._carried_out(small, first, timings, progress)
        assert low.latents is not None
        large = upsampler(low.latents, upscale.adain_factor, upscale.tone_map_compression_ratio, timings, progress)
        refining = refining.model_copy(update={"latents": normalized(large, scale)})
        result: VideosResult = self._carried_out(refining, second, timings, progress)
        request = replace(request, steps=low.provenance["inputs"]["steps"])
        result.provenance["inputs"] = self._as_inputs(inputs, request)
        result.warnings = list(dict.fromkeys([*low.warnings, *result.warnings]))
        return result

    def _upsampler_for(self, request: Request) -> Upsampler:
        """Return what enlarges to the size of a request; refuse sizes that it cannot make, and models without one."""
        if self._upsampler is None:
            raise InputError(
                f"the model has no {UPSAMPLER}",
                where="upscale",
                hint=f'Bring the one that is published with it by [load.parts]: {UPSAMPLER} = "FOLDER".',
            )
        for name in ("width", "height") if self._upsampler.doubles_sides else ():
            check_side(name, getattr(request, name), 2 * self.architecture.multiple)
        return self._upsampler

    def _every(self, inputs: Any) -> int:
        more = self._upsampler is not None and self._upsampler.doubles_frames
        return 2 if more and inputs.upscale is not None else 1

    def _refined(self, inputs: Any) -> Request:
        """Return the second run; refuse one that cannot be, before the first one takes its time."""
        try:
            request = self._requested(inputs)[0]
            sampling, begun = self.scheduling.start(request, self._strength(request), self._size(request))
            _first(begun, sampling)
        except InputError as error:
            error.where = f"upscale.{error.where}" if error.where in Upscale.model_fields else error.where
            raise
        return request

    def _check_frame(self, condition: VideoCondition, where: str, frames: int, every: int) -> None:
        """Refuse a frame that is not there, one that a video cannot begin at, and one that the first run leaves out."""
        frame, shows_video = condition.frame_index, condition.video is not None
        unit = every * (self.architecture.frame_factor if shows_video else 1)
        if frame >= frames:
            raise InputError(f"there is no frame {frame}", where=where, hint=f"Give 0 to {frames - 1}.")
        if frame % unit:
            why = "a video begins" if shows_video else "the first run has a frame"
            raise InputError(
                f"{frame} is not a multiple of {unit}, at which {why}",
                where=where,
                hint=f"The nearest are {frame // unit * unit} and {frame // unit * unit + unit}.",
            )

    def _as_inputs(self, inputs: Any, request: Request) -> dict[str, Any]:
        made = super()._as_inputs(inputs, request)
        if inputs.conditions:
            made["conditions"] = [_written(condition) for condition in inputs.conditions]
            made["image_cond_noise_scale"] = inputs.image_cond_noise_scale
        if inputs.video is not None:
            made["video"] = clip_name(inputs.video)
        if inputs.upscale is not None:
            made["upscale"] = inputs.upscale.model_dump(exclude_none=True)
        return made if request.strength == 1 else made | {"strength": request.strength}

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        assert request.video is not None
        first, shape, notes = _first(request, sampling), self.latents_shape(request), list[str]()
        latents = rng.randn(shape) * np.float32(sampling.init_noise_sigma)
        if request.strength < 1:
            with timings.span("vae_encoder"):
                own = self._own(inputs, request, notes)
            latents = sampling.add_noise(own, latents, first)
        architecture, rate = self.architecture, request.video.rate
        if not inputs.conditions:
            held = {PLACES: architecture.places(shape[2:], rate)}
            return Start(architecture.pack(latents), first, held=held, notes=notes)
        conditions, scale = Conditions(architecture, latents, rate), replace(architecture.encoding, factor=1.0)
        with timings.span("vae_encoder"):
            for number, condition in enumerate(inputs.conditions):
                pixels = self._pixels(condition, f"conditions.{number}", request, notes)
                given = normalized(drawn(self._encoded_alike(pixels, request), rng), scale)
                conditions.add(given, condition.frame_index, condition.strength, rng)
        start = conditions.start(sampling, first, inputs.image_cond_noise_scale, rng)
        return replace(start, notes=notes)

    def _own(self, inputs: Any, request: Request, notes: list[str]) -> Array:
        """Return the latents that a run starts from, (videos, channels, frames, height, width)."""
        assert request.video is not None
        if inputs.latents is not None:
            return read_latents(inputs.latents, self.latents_shape(request))
        frames, every = request.video.frames, request.video.every
        pixels = self._frames(inputs.video, "video", frames, request, notes)
        if (read := pixels.shape[1]) < frames:
            usable, wanted = ((count - 1) * every + 1 for count in (read, frames))
            raise InputError(
                f"{usable} of its frames can be taken, and {wanted} are to be made of it",
                where="video",
                hint=f"Set num_frames = {usable}, or give a longer one.",
            )
        mean, _ = np.split(self._encoded_alike(pixels, request), 2, axis=1)
        return normalized(mean, replace(self.architecture.encoding, factor=1.0))

    def _pixels(self, condition: VideoCondition, where: str, request: Request, notes: list[str]) -> Array:
        """Return what a condition shows, float32 (3, frames, height, width) from -1 to 1."""
        assert request.video is not None
        if condition.image is not None:
            image = resized(condition.image, f"{where}.image", request.width, request.height)
            return pixels_of(image)[:, None]
        return self._frames(
            condition.video, f"{where}.video", request.video.frames - condition.frame_index, request, notes
        )

    def _frames(self, clip: Any, where: str, room: int, request: Request, notes: list[str]) -> Array:
        """Return what of a video there is room for, likewise, and note what is left out."""
        assert request.video is not None
        unit, size = self.architecture.frame_factor, (request.width, request.height)
        return read_footage(clip, where, size, unit, notes, room, request.video.every).pixels

    def _encoded_alike(self, pixels: Array, request: Request) -> Array:
        """Return what the encoder gives for pixels, for each video: (videos, channels * 2, frames, height, width)."""
        return np.repeat(self._encode_whole(pixels)[None], len(request.prompts), axis=0)


def _first(request: Request, sampling: Sampling) -> int:
    """Return the step to begin at: those that strength leaves are counted, as LTXConditionPipeline does."""
    left = min(int(request.steps * request.strength), request.steps)
    if not left:
        raise InputError(
            f"{request.strength:g} of {request.steps} steps leaves none", where="strength", hint="Give more."
        )
    return (request.steps - left) * -(-len(sampling.timesteps) // request.steps)


def _written(condition: VideoCondition) -> dict[str, Any]:
    """Return a condition as provenance has it."""
    numbers = condition.model_dump(include={"frame_index", "strength"}, exclude_defaults=True)
    shown = picture_name(condition.image) if condition.video is None else clip_name(condition.video)
    return {"image" if condition.video is None else "video": shown, **numbers}
