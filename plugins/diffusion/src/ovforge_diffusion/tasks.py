"""text-to-image, image-to-image, inpainting: where a run begins."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import Sampling
from ovforge.errors import InputError, ModelError
from ovforge.model import BatchGenerator, ImagesResult, Timings, open_picture
from ovforge_diffusion.batching import joined, key_of, parts_of
from ovforge_diffusion.diffusion import Diffusion, Start
from ovforge_diffusion.examples import drawing, hole, prompts
from ovforge_diffusion.inputs import ImageToImageInputs, InpaintingInputs, TextToImageInputs
from ovforge_diffusion.latents import read_latents
from ovforge_diffusion.request import Request, resized, resized_mask
from ovforge_diffusion.vae import pixels_of

__all__ = ["ImageToImage", "Inpainting", "TextToImage"]

Array = NDArray[np.float32]


class TextToImage(Diffusion):
    """From noise."""

    def examples(self, count: int) -> Sequence[TextToImageInputs]:
        """Return the shipped prompts, with the conditions that the pipeline's ControlNets need."""
        return [TextToImageInputs(prompt=text, seed=n, **self._conditions(n)) for n, text in prompts(count)]

    def batch_key(self, inputs: TextToImageInputs) -> Hashable | None:
        """Return what pictures of one batch share; None for calls that start from a picture, or may name adapters."""
        return None if self.encodes or self._options.prompts == "weighted" else key_of(inputs)

    def join(self, calls: Sequence[TextToImageInputs]) -> TextToImageInputs:
        """Return one call for the pictures of all."""
        return joined(calls)

    def split(self, result: ImagesResult, calls: Sequence[TextToImageInputs]) -> Sequence[ImagesResult] | None:
        """Return each call's pictures; None if the result says something of prompts."""
        return parts_of(result, calls)

    def _begin(
        self, inputs: TextToImageInputs, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings
    ) -> Start:
        if self.family.masked:
            raise ModelError(
                f"its UNet takes {self.family.channels} channels: it was made for inpainting",
                where="unet/config.json",
                hint='Set task = "inpainting".',
            )
        return Start(self._noise(request, rng) * np.float32(sampling.init_noise_sigma))

    def _noise(self, request: Request, rng: BatchGenerator) -> Array:
        """Return the first noise: the user's own, or drawn."""
        shape = self.latents_shape(request)
        given = request.given.latents
        return rng.randn(shape) if given is None else read_latents(given, shape)


class ImageToImage(TextToImage):
    """From a noised picture (Meng et al. 2022, SDEdit), or from another model's latents."""

    encodes = True

    def examples(self, count: int) -> Sequence[Any]:
        """Return the shipped prompts with drawn pictures of the model's own size."""
        size = self.family.size
        return [
            ImageToImageInputs(prompt=text, seed=n, image=[drawing(n, size)], **self._conditions(n))
            for n, text in prompts(count)
        ]

    def _size_of(self, inputs: Any) -> tuple[int, int] | None:
        if inputs.image is None:
            if inputs.latents is None:
                raise InputError("no picture to start from", where="image", hint="Give image, or latents.")
            return None
        if inputs.latents is not None:
            raise InputError("given beside an image", where="latents", hint="Start from one of them.")
        if inputs.denoising_start is not None:
            raise InputError(
                "says where latents stand, and an image stands at the end",
                where="denoising_start",
                hint="Give the base model's latents, or set strength.",
            )
        size: tuple[int, int] = open_picture(inputs.image[0], "image").size
        return size

    def _sampling(self, inputs: Any, steps: int) -> Sampling:
        whole = inputs.denoising_start is not None
        return self._partly(steps, 1.0 if whole else inputs.strength)

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        if self.family.masked:
            super()._begin(inputs, request, sampling, rng, timings)  # says what it was made for
        if inputs.image is None:
            latents = read_latents(inputs.latents, self.latents_shape(request))
            if inputs.denoising_start is not None:
                return Start(latents, self._first(inputs.denoising_start, request, sampling))
        else:
            latents = self._encoded(inputs.image, request, rng, timings)
        noise = rng.randn(latents.shape)
        return Start(sampling.add_noise(latents, noise, sampling.first), sampling.first)

    def _encoded(self, images: list[Any], request: Request, rng: BatchGenerator, timings: Timings) -> Array:
        prompts = len(request.prompts) // request.given.count
        if len(images) not in (1, prompts):
            raise InputError(f"{len(images)} pictures for {prompts} prompts", where="image", hint="Give one for each.")
        with timings.span("vae_encoder"):
            each = [
                self.autoencoder.encode(pixels_of(resized(image, "image", request.width, request.height)))
                for image in images
            ]
        rows = each * prompts if len(each) == 1 else each
        return self.autoencoder.sample([row for row in rows for _ in range(request.given.count)], rng)

    def _first(self, start: float, request: Request, sampling: Sampling) -> int:
        """Return the first step below a part of the noise schedule, as diffusers' SDXL pipeline counts it."""
        cutoff = round(self.family.train_timesteps * (1 - start))
        left = int((np.asarray(sampling.timesteps) < cutoff).sum())
        if len(sampling.timesteps) == 2 * request.steps - 1 and left % 2 == 0:
            left += 1  # a method of second order calls the network twice a step; both belong together
        if not left:
            raise InputError("leaves no step", where="denoising_start", hint="Take more steps, or start earlier.")
        return len(sampling.timesteps) - left


class Inpainting(TextToImage):
    """A masked part anew: by a UNet that sees the mask, or by blending after each step."""

    encodes = True
    inpaints = True

    def examples(self, count: int) -> Sequence[Any]:
        """Return the shipped prompts with drawn pictures and holes in them."""
        size = self.family.size
        return [
            InpaintingInputs(prompt=text, seed=n, image=drawing(n, size), mask=hole(n, size), **self._conditions(n))
            for n, text in prompts(count)
        ]

    def _size_of(self, inputs: Any) -> tuple[int, int]:
        size: tuple[int, int] = open_picture(inputs.image, "image").size
        mask: tuple[int, int] = open_picture(inputs.mask, "mask").size
        if size != mask:
            raise InputError(
                f"is {mask[0]}x{mask[1]}, and the picture is {size[0]}x{size[1]}",
                where="mask",
                hint="Give a mask of the picture's size: white is painted anew, black stays.",
            )
        return size

    def _sampling(self, inputs: Any, steps: int) -> Sampling:
        return self._partly(steps, inputs.strength)

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        family, autoencoder = self.family, self.autoencoder
        image = resized(inputs.image, "image", request.width, request.height)
        pixels = pixels_of(image)
        mask = _mask(inputs.mask, request)
        finish = _Paste(image, mask) if inputs.paste else Start.finish
        small = mask[:, :: family.factor, :: family.factor]
        shape, pictures = self.latents_shape(request), len(request.prompts)
        full = inputs.strength == 1.0
        original: Array | None = None
        with timings.span("vae_encoder"):
            if not (full and family.masked):
                original = autoencoder.sample([autoencoder.encode(pixels)] * pictures, rng)
            noise = self._noise(request, rng)
            if full:
                latents = noise * np.float32(sampling.init_noise_sigma)
            else:
                assert original is not None
                latents = sampling.add_noise(original, noise, sampling.first)
            if family.masked:
                hidden = autoencoder.encode(pixels * (mask < 0.5))
                hidden_latents = autoencoder.sample([hidden] * pictures, rng)
                extra = np.concatenate([np.broadcast_to(small, (pictures, *small.shape)), hidden_latents], axis=1)
                return Start(latents, sampling.first, extra=extra, finish=finish)
        rng.randn(shape)  # where the other kind of UNet draws the latents of the masked picture, diffusers draws, too
        assert original is not None
        return Start(latents, sampling.first, blend=_Blend(original, noise, small[None], sampling), finish=finish)


class _Blend:
    """Puts what stays back after each step, at the step's level of noise (Lugmayr et al. 2022, without resampling)."""

    def __init__(self, original: Array, noise: Array, mask: Array, sampling: Sampling) -> None:
        self._original, self._noise, self._mask, self._sampling = original, noise, mask, sampling

    def __call__(self, latents: Array, index: int) -> Array:
        kept = self._original
        if index + 1 < len(self._sampling.timesteps):
            kept = self._sampling.add_noise(kept, self._noise, index + 1)
        return (np.float32(1) - self._mask) * kept + self._mask * latents


class _Paste:
    """Puts the pixels back that the mask, float32 (1, height, width), leaves as they are."""

    def __init__(self, original: Image.Image, mask: Array) -> None:
        self._original, self._painted = original, Image.fromarray((mask[0] * 255).astype(np.uint8))

    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.composite(image, self._original, self._painted)


def _mask(image: Any, request: Request) -> Array:
    """Return a mask, float32 (1, height, width): 1 where the picture is painted anew, else 0."""
    grey = resized_mask(image, "mask", request.width, request.height)
    return (np.asarray(grey, np.float32)[None] / np.float32(255) >= 0.5).astype(np.float32)
