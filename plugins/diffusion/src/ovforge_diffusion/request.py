"""A call with every default filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ovforge.errors import InputError
from ovforge.model import fresh_seed, open_picture, picture_name
from ovforge_diffusion.editing import adapters_in, without_comments
from ovforge_diffusion.family import Family
from ovforge_diffusion.inputs import Control, DiffusionInputs

__all__ = ["Request", "make_request", "resized", "resized_mask", "seeds_of"]


@dataclass(frozen=True)
class Request:
    """What is made. Sizes in pixels; prompts, negative prompts and seeds are one for each picture."""

    prompts: tuple[tuple[str, str], ...]
    """For the first text encoder and for the second."""

    negatives: tuple[tuple[str, str], ...] | None
    """None if there is no guidance, or where nothing means zeros."""

    guided: bool
    steps: int
    guidance_scale: float
    width: int
    height: int
    seeds: tuple[int, ...]
    controls: tuple[Control, ...]
    decode: bool
    given: DiffusionInputs

    def without_adapters(self) -> tuple[Request, dict[str, float]]:
        """Return the call without comments and `<lora:NAME:STRENGTH>` in its prompts, and the adapters that they name.

        Raises InputError if the prompts of a batch differ in that: adapters hold for the whole batch.
        """
        read = [[adapters_in(without_comments(text)) for text in pair] for pair in self.prompts]
        named = [pair[0][1] for pair in read]
        if any(other != named[0] for other in named) or any(pair[1][1] not in ({}, pair[0][1]) for pair in read):
            raise InputError(
                "the prompts of one call name different adapters",
                where="prompt",
                hint="Adapters hold for a whole batch: make a call for each set of them.",
            )
        prompts = tuple((first[0], second[0]) for first, second in read)
        return replace(self, prompts=prompts), named[0]

    def as_inputs(self) -> dict[str, Any]:
        """Return inputs that make these pictures again; pictures given in memory are named by their digest."""
        written = {
            name: value for name in self.given.model_fields_set if (value := getattr(self.given, name)) is not None
        }
        for name in ("image", "mask", "latents"):
            if name in written:
                value = written[name]
                written[name] = [_name(item) for item in value] if isinstance(value, list) else _name(value)
        if "control" in written:
            written["control"] = [
                {**control.model_dump(exclude={"image"}, exclude_defaults=True), "image": _name(control.image)}
                for control in self.controls
            ]
        return {
            **written,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "width": self.width,
            "height": self.height,
            "seed": self.seeds[0] if len(self.seeds) == 1 else list(self.seeds),
        }


def _name(value: Any) -> str:
    if hasattr(value, "tobytes") and not isinstance(value, Image.Image):  # latents as an array
        import hashlib

        return "sha256:" + hashlib.sha256(value.tobytes()).hexdigest()
    return picture_name(value)


def make_request(inputs: DiffusionInputs, family: Family, size: tuple[int, int] | None) -> Request:
    """Fill in what is left out; `size` is (width, height) of the picture to start from.

    Raises InputError for what the model cannot do, and for what would have no effect.
    """
    prompts = [inputs.prompt] if isinstance(inputs.prompt, str) else list(inputs.prompt)
    guidance = family.defaults["guidance_scale"] if inputs.guidance_scale is None else inputs.guidance_scale
    guided = not family.guidance_width and guidance > 1
    default_width, default_height = _floor(size, family.factor) if size else (family.size, family.size)
    for name in ("prompt_2", "negative_prompt_2"):
        if getattr(inputs, name) is not None and len(family.encoders) < 2:
            raise InputError("the model has one text encoder", where=name, hint="Leave it out.")
    if inputs.guidance_rescale and not guided:
        raise InputError("no effect without guidance", where="guidance_rescale", hint="Set guidance_scale above 1.")
    if inputs.decode and inputs.denoising_end is not None:
        raise InputError(
            "latents that a refiner is to finish make no picture", where="decode", hint="Leave denoising_end out."
        )
    return Request(
        prompts=_each("prompt", prompts, inputs.prompt_2, prompts, inputs.count),
        negatives=_negatives(inputs, family, prompts, guided),
        guided=guided,
        steps=inputs.steps or family.defaults["steps"],
        guidance_scale=guidance,
        width=_side("width", inputs.width or default_width, family.factor),
        height=_side("height", inputs.height or default_height, family.factor),
        seeds=seeds_of(inputs.seed, len(prompts) * inputs.count),
        controls=_controls(inputs, family),
        decode=inputs.denoising_end is None if inputs.decode is None else inputs.decode,
        given=inputs,
    )


def _negatives(
    inputs: DiffusionInputs, family: Family, prompts: Sequence[str], guided: bool
) -> tuple[tuple[str, str], ...] | None:
    """Return the negative prompt of each picture; refuse one that would do nothing."""
    given = inputs.negative_prompt if inputs.negative_prompt is not None else inputs.negative_prompt_2
    if given is not None and family.guidance_width:
        raise InputError(
            "the model has its guidance built in, and takes no negative prompt",
            where="negative_prompt",
            hint="Leave it out.",
        )
    if given is not None and given != "" and not guided:
        raise InputError(
            "no effect without guidance",
            where="negative_prompt",
            hint="Set guidance_scale above 1, or leave the negative prompt out.",
        )
    if not guided or (given is None and family.zero_negative):
        return None
    negative = inputs.negative_prompt
    first = negative if isinstance(negative, list) else [negative or ""] * len(prompts)
    return _each("negative_prompt", first, inputs.negative_prompt_2, prompts, inputs.count)


def _each(
    name: str, first: Sequence[str], second: str | Sequence[str] | None, prompts: Sequence[str], count: int
) -> tuple[tuple[str, str], ...]:
    """Return pairs of prompts, one for each picture; the second is the first if it is not given."""
    other = [second] * len(prompts) if isinstance(second, str) else list(second or first)
    for label, texts in ((name, first), (f"{name}_2", other)):
        if len(texts) != len(prompts):
            what = label.replace("_", " ")
            raise InputError(f"{len(texts)} {what}s for {len(prompts)} prompts", where=label, hint="Give one for each.")
    return tuple(pair for pair in zip(first, other, strict=True) for _ in range(count))


def _floor(size: tuple[int, int], factor: int) -> tuple[int, int]:
    width, height = size
    return max(width // factor, 1) * factor, max(height // factor, 1) * factor


def _side(name: str, pixels: int, factor: int) -> int:
    """Return a width or height that the autoencoder can make."""
    if pixels % factor:
        lower = max(pixels // factor * factor, factor)
        raise InputError(
            f"{pixels} is not a multiple of {factor}",
            where=name,
            hint=f"The nearest sizes are {lower} and {lower + factor}.",
        )
    return pixels


def seeds_of(seed: int | list[int] | None, pictures: int) -> tuple[int, ...]:
    """Return a seed for each picture: those given, or the one given and the numbers after it."""
    if isinstance(seed, list):
        if len(seed) != pictures:
            raise InputError(f"{len(seed)} seeds for {pictures} pictures", where="seed", hint="Give one for each.")
        return tuple(seed)
    first = fresh_seed() if seed is None else seed
    return tuple(first + number for number in range(pictures))


def _controls(inputs: DiffusionInputs, family: Family) -> tuple[Control, ...]:
    given = tuple(inputs.control or ())
    if len(given) != len(family.controlnets):
        raise InputError(
            f"{len(given)} given for {len(family.controlnets)} ControlNets in the pipeline",
            where="control",
            hint='A ControlNet comes by [load.parts]: controlnet = "FOLDER", controlnet_1 = ...; give one for each.',
        )
    for control in given:
        if control.start >= control.end:
            raise InputError(f"start = {control.start:g} is not before end = {control.end:g}", where="control")
    return given


def resized(image: Any, where: str, width: int, height: int) -> Image.Image:
    """Return an RGB picture at a size, by Lanczos if it has another, as diffusers' image processor does."""
    return _scaled(open_picture(image, where), width, height)


def resized_mask(image: Any, where: str, width: int, height: int) -> Image.Image:
    """Return a mask at a size, mode L: its brightness times its opacity, so that what is transparent is black."""
    return _scaled(open_picture(image, where, "L", background="black"), width, height)


def _scaled(opened: Image.Image, width: int, height: int) -> Image.Image:
    return opened if opened.size == (width, height) else opened.resize((width, height), Image.Resampling.LANCZOS)
