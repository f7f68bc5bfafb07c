"""text-to-image, image-to-image, inpainting: where a run begins."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import Sampling
from ovforge.errors import InputError, ModelError
from ovforge.model import BatchGenerator, ImagesResult, Timings, open_picture
from ovforge_diffusion.architectures.base import Arrays, Task
from ovforge_diffusion.batching import joined, key_of, parts_of
from ovforge_diffusion.cropping import Crop
from ovforge_diffusion.diffusion import Diffusion, Start
from ovforge_diffusion.examples import drawing, hole, prompts
from ovforge_diffusion.inputs import DiffusionInputs, ImageToImageInputs, InpaintingInputs, TextToImageInputs
from ovforge_diffusion.latents import read_latents
from ovforge_diffusion.request import Request
from ovforge_diffusion.resizing import resized, resized_mask, scaled
from ovforge_diffusion.vae import pixels_of

__all__ = ["ImageToImage", "Inpainting", "TextToImage"]

Array = NDArray[np.float32]


class TextToImage(Diffusion):
    """From noise."""

    name: ClassVar[Task] = "text-to-image"

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
        self._refuse_masked()
        noise = self._noise(request, rng) * np.float32(sampling.init_noise_sigma)
        return Start(self.architecture.pack(noise))

    def _refuse_masked(self) -> None:
        """Refuse a model that was made for inpainting."""
        if self.architecture.masked:
            role = self.architecture.denoiser
            what = "UNet" if role == "unet" else role
            raise ModelError(
                f"its {what} takes {self.architecture.channels} channels: it was made for inpainting",
                where=f"{role}/config.json",
                hint='Set task = "inpainting".',
            )

    def _noise(self, request: Request, rng: BatchGenerator) -> Array:
        """Return the first noise: the user's own, or drawn."""
        shape = self.latents_shape(request)
        given = request.given.latents
        return rng.randn(shape) if given is None else read_latents(given, shape)


class ImageToImage(TextToImage):
    """From a noised picture (Meng et al. 2022, SDEdit), or from another model's latents."""

    name = "image-to-image"
    encodes = True

    def examples(self, count: int) -> Sequence[Any]:
        """Return the shipped prompts with drawn pictures of the model's own size."""
        size = self.architecture.size
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
        _refuse_start(inputs)
        size: tuple[int, int] = open_picture(inputs.image[0], "image").size
        return size

    def _shown(self, images: Sequence[Any]) -> list[Image.Image]:
        """Return pictures as the denoiser is to see them: those of several prompts in one size."""
        architecture = self.architecture
        shown = [architecture.shown(open_picture(image, "image")) for image in images]
        if architecture.references > 1:
            return shown
        return [scaled(open_picture(image, "image"), *shown[0].size) for image in images]

    def _references(self, inputs: Any) -> tuple[tuple[int, int], ...]:
        if not self.architecture.references:
            return ()
        if not inputs.image:
            raise InputError("no picture to edit", where="image", hint='Give one, or set task = "text-to-image".')
        for name in ("strength", "denoising_start"):
            if getattr(inputs, name) is not None:
                raise InputError(
                    f"{self.architecture.name} sees the whole picture, and begins with noise", where=name,
                    hint="Leave it out.",
                )  # fmt: skip
        if len(inputs.image) > self.architecture.references > 1:
            raise InputError(
                f"{len(inputs.image)} pictures, and {self.architecture.name} sees {self.architecture.references} at "
                "most", where="image", hint="Give fewer.",
            )  # fmt: skip
        sizes = [image.size for image in self._shown(inputs.image)]
        return tuple(sizes if self.architecture.references > 1 else sizes[:1])

    def _strength(self, request: Request) -> float:
        if self.architecture.references:
            return 1.0
        return _part(request)

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        self._refuse_masked()
        pack = self.architecture.pack
        if self.architecture.references:
            beside = self.architecture.beside(self._seen(inputs.image, request, timings))
            noise = self._noise(request, rng) * np.float32(sampling.init_noise_sigma)
            return Start(pack(noise), extra=beside)
        if inputs.image is None:
            latents = read_latents(inputs.latents, self.latents_shape(request))
            if inputs.denoising_start is not None:
                first = self.scheduling.first_below(sampling, inputs.denoising_start, request.steps)
                return Start(pack(latents), first)
        else:
            latents = self._encoded(inputs.image, request, rng, timings)
        noise = rng.randn(latents.shape)
        return Start(sampling.add_noise(pack(latents), pack(noise), sampling.first), sampling.first)

    def _seen(self, images: list[Any], request: Request, timings: Timings) -> list[Array]:
        """Return the latents of what the denoiser sees beside each picture: one array for each place beside it."""
        with timings.span("vae_encoder"):
            each = [
                self.autoencoder.likeliest(self.autoencoder.encode(pixels_of(image))) for image in self._shown(images)
            ]
        if self.architecture.references > 1:
            return [np.stack([latents] * len(request.prompts)) for latents in each]
        return [np.stack(self._of_prompts(each, request))]

    def _of_prompts(self, each: list[Array], request: Request) -> list[Array]:
        """Return one of each for each picture made, from one for all or one for each prompt."""
        prompts = len(request.prompts) // request.given.count
        if len(each) not in (1, prompts):
            raise InputError(f"{len(each)} pictures for {prompts} prompts", where="image", hint="Give one for each.")
        rows = each * prompts if len(each) == 1 else each
        return [row for row in rows for _ in range(request.given.count)]

    def _encoded(self, images: list[Any], request: Request, rng: BatchGenerator, timings: Timings) -> Array:
        with timings.span("vae_encoder"):
            each = [
                self.autoencoder.encode(pixels_of(resized(image, "image", request.width, request.height)))
                for image in images
            ]
        return self.autoencoder.sample(self._of_prompts(each, request), rng)


class Inpainting(TextToImage):
    """A masked part anew: by a UNet that sees the mask, or by blending after each step."""

    name = "inpainting"
    encodes = True

    def examples(self, count: int) -> Sequence[Any]:
        """Return the shipped prompts with drawn pictures and holes in them."""
        size = self.architecture.size
        return [
            InpaintingInputs(prompt=text, seed=n, image=drawing(n, size), mask=hole(n, size), **self._conditions(n))
            for n, text in prompts(count)
        ]

    def _requested(self, inputs: DiffusionInputs) -> tuple[Request, dict[str, float]]:
        request, adapters = super()._requested(inputs)
        other = self._reference(inputs)
        if self.architecture.references:
            own, others = [(request.width, request.height)], [other.size] if other else []
            request = replace(request, references=tuple(self._seen_of(own, others)))
        return request, adapters

    def _seen_of(self, own: list[Any], others: list[Any]) -> list[Any]:
        """Return what the denoiser sees: of one picture another in place of the one to paint in, else both."""
        return own + others if self.architecture.references > 1 else others or own

    def _reference(self, inputs: Any) -> Image.Image | None:
        """Return the picture that the denoiser sees besides the one to paint in, or in its place, if there is one."""
        if inputs.reference is None:
            return None
        if not self.architecture.references or self.architecture.image_encoders:
            raise InputError(
                f"{self.architecture.name} takes no other picture to see in inpainting",
                where="reference",
                hint="It is for FLUX.1 Kontext and FLUX.2: leave it out.",
            )
        return self.architecture.shown(open_picture(inputs.reference, "reference"))

    def _picture(self, inputs: Any) -> Image.Image:
        """Return the picture to paint in, before it gets the size that is made."""
        image: Image.Image = open_picture(inputs.image, "image")
        return image if inputs.width or inputs.height else self.architecture.limited(image)

    def _size_of(self, inputs: Any) -> tuple[int, int] | None:
        if inputs.image is None:
            self._check_continued(inputs)
            return None
        _refuse_start(inputs)
        size: tuple[int, int] = open_picture(inputs.image, "image").size
        mask: tuple[int, int] = open_picture(inputs.mask, "mask").size
        if size != mask:
            raise InputError(
                f"is {mask[0]}x{mask[1]}, and the picture is {size[0]}x{size[1]}",
                where="mask",
                hint="Give a mask of the picture's size: white is painted anew, black stays.",
            )
        limited: tuple[int, int] = self._picture(inputs).size
        return limited

    def _check_continued(self, inputs: Any) -> None:
        """Refuse what a run needs a picture for, or cannot continue."""
        if inputs.denoising_start is None or inputs.latents is None:
            more = "; or the latents that a base model began, with denoising_start"
            hint = f"Give one{more if self.architecture.denoiser == 'unet' else ''}."
            raise InputError("no picture to paint in", where="image", hint=hint)
        if self.architecture.denoiser != "unet" or self.architecture.masked:
            raise InputError(
                f"{self.architecture.name} continues no latents in inpainting"
                + (": its UNet sees the picture" if self.architecture.masked else ""),
                where="denoising_start",
                hint="Give the picture.",
            )
        for name in ("padding_mask_crop", "paste", "reference"):
            if getattr(inputs, name):
                raise InputError("needs the picture, and there are latents alone", where=name, hint="Leave it out.")

    def _strength(self, request: Request) -> float:
        return _part(request)

    def _seen_by_controlnets(self, request: Request, rng: BatchGenerator, timings: Timings) -> Sequence[Arrays]:
        if self.architecture.stacks_condition:  # diffusers draws latents of the masked picture first, and drops them
            rng.randn(self.latents_shape(request))
        return super()._seen_by_controlnets(request, rng, timings)

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        if inputs.image is None:
            return self._continued(inputs, request, sampling, rng)
        architecture, autoencoder = self.architecture, self.autoencoder
        pack = architecture.pack
        image, grey, finish = self._to_paint(inputs, request)
        pixels, mask = pixels_of(image), _mask(grey)
        shape, pictures = self.latents_shape(request), len(request.prompts)
        full = request.strength == 1.0 and architecture.noise_at_full_strength
        original: Array | None = None
        seen: Array | None = None
        with timings.span("vae_encoder"):
            if architecture.references:
                original = self._to_see(pixels, pictures, rng)
                other = self._reference(inputs)
                others = [] if other is None else [self._to_see(pixels_of(other), pictures, rng)]
                seen = np.concatenate(self._seen_of([original], others), axis=1)
            elif not (full and architecture.masked):
                original = pack(autoencoder.sample([autoencoder.encode(pixels)] * pictures, rng))
            noise = pack(self._noise(request, rng))
            if full:
                latents = noise * np.float32(sampling.init_noise_sigma)
            else:
                assert original is not None
                latents = sampling.add_noise(original, noise, sampling.first)
            if architecture.masked:
                hidden = autoencoder.encode(pixels * (mask < 0.5))
                hidden_latents = autoencoder.sample([hidden] * pictures, rng)
                extra = architecture.masked_extra(np.broadcast_to(mask, (pictures, *mask.shape)), hidden_latents)
                return Start(latents, sampling.first, extra=extra, finish=finish)
        if seen is None:  # where the other kind of UNet draws the latents of the masked picture, diffusers draws, too
            rng.randn(shape)
        assert original is not None
        blend = self._blend(original, noise, mask, request, sampling, sampling.first)
        return Start(latents, sampling.first, extra=seen, blend=blend, finish=finish)

    def _continued(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator) -> Start:
        """Return where latents of a base model stand, which also are what the mask leaves, as in diffusers."""
        shape = self.latents_shape(request)
        latents = self.architecture.pack(read_latents(inputs.latents, shape))
        noise = self.architecture.pack(rng.randn(shape))
        mask = _mask(resized_mask(inputs.mask, "mask", request.width, request.height))
        first = self.scheduling.first_below(sampling, inputs.denoising_start, request.steps)
        return Start(latents, first, blend=self._blend(latents, noise, mask, request, sampling, first))

    def _blend(
        self, original: Array, noise: Array, mask: Array, request: Request, sampling: Sampling, first: int
    ) -> _Blend:
        where = np.broadcast_to(self.architecture.kept(mask), self.latents_shape(request))
        last = self.scheduling.steps(sampling, first, request.given.denoising_end)[-1]
        return _Blend(original, noise, self.architecture.pack(where), sampling, last)

    def _to_paint(
        self, inputs: Any, request: Request
    ) -> tuple[Image.Image, Image.Image, Callable[[Image.Image], Image.Image]]:
        """Return the picture and the mask at the size that is made, and what is done with each picture made."""
        size = request.width, request.height
        if inputs.padding_mask_crop is None:
            image = scaled(self._picture(inputs), *size)
            grey = resized_mask(inputs.mask, "mask", *size)
            return image, grey, _Paste(image, _mask(grey)) if inputs.paste else Start.finish
        whole = self._picture(inputs)
        mask = resized_mask(inputs.mask, "mask", *whole.size)
        crop = Crop.around(whole, mask, inputs.padding_mask_crop, size)
        return crop.seen(whole, *size), crop.seen(mask, *size), crop.put_back

    def _to_see(self, pixels: Array, pictures: int, rng: BatchGenerator) -> Array:
        """Return packed latents of what the denoiser sees, for each picture."""
        encoded = self.autoencoder.encode(pixels)
        if self.architecture.draws_references:
            return self.architecture.pack(self.autoencoder.sample([encoded] * pictures, rng))
        return self.architecture.pack(np.stack([self.autoencoder.likeliest(encoded)] * pictures))


def _refuse_start(inputs: Any) -> None:
    """Refuse to begin with a picture where latents should stand."""
    if inputs.denoising_start is not None:
        raise InputError(
            "says where latents stand, and an image stands at the end",
            where="denoising_start",
            hint="Give the base model's latents in place of the image, or set strength.",
        )


def _part(request: Request) -> float:
    """Return the part of the schedule that a run goes, if it does not begin where latents stand."""
    given: Any = request.given
    if given.denoising_start is None:
        return request.strength
    if given.strength is not None:
        raise InputError("given beside denoising_start", where="strength", hint="Leave one of them out.")
    return 1.0


class _Blend:
    """Puts what stays back after each step, at the step's level of noise (Lugmayr et al. 2022, without resampling).

    After the `last` step it has none, also where a run ends early: so diffusers hands it to a refiner.
    """

    def __init__(self, original: Array, noise: Array, mask: Array, sampling: Sampling, last: int) -> None:
        self._original, self._noise, self._mask, self._sampling, self._last = original, noise, mask, sampling, last

    def __call__(self, latents: Array, index: int) -> Array:
        kept = self._original
        if index < self._last:
            kept = self._sampling.add_noise(kept, self._noise, index + 1)
        return (np.float32(1) - self._mask) * kept + self._mask * latents


class _Paste:
    """Puts the pixels back that the mask, float32 (1, height, width), leaves as they are."""

    def __init__(self, original: Image.Image, mask: Array) -> None:
        self._original, self._painted = original, Image.fromarray((mask[0] * 255).astype(np.uint8))

    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.composite(image, self._original, self._painted)


def _mask(grey: Image.Image) -> Array:
    """Return a mask, float32 (1, height, width): 1 where the picture is painted anew, else 0."""
    return (np.asarray(grey, np.float32)[None] / np.float32(255) >= 0.5).astype(np.float32)
