"""A call with every default filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ovforge.errors import InputError
from ovforge.model import fresh_seed, picture_name
from ovforge_diffusion.architectures.base import Architecture, Texts
from ovforge_diffusion.architectures.bins import binned
from ovforge_diffusion.editing import adapters_in, without_comments
from ovforge_diffusion.inputs import Control, DiffusionInputs

__all__ = ["Request", "Video", "check_side", "make_request", "seeds_of"]


@dataclass(frozen=True)
class Video:
    """What is said of a video alone: its frames, how many a second, and the noise that is decoded with its latents.

    Of videos that it is made from, it has each frame, or with `every` = 2 each second one.
    """

    frames: int
    rate: float
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    every: int = 1


_SIZES = (
    "original_size", "target_size", "crop", "negative_original_size", "negative_target_size", "negative_crop",
    "aesthetic_score", "negative_aesthetic_score",
)  # fmt: skip
"""What tells models of Stable Diffusion XL of sizes and scores."""

_PICTURES = ("image", "mask", "around")
"""What of a condition is a picture."""


@dataclass(frozen=True)
class Request:
    """What is made. Sizes in pixels; prompts, negative prompts and seeds are one for each picture or video."""

    prompts: tuple[Texts, ...]
    """A text for each text encoder that can have its own."""

    negatives: tuple[Texts, ...] | None
    """None if there is no guidance, or where nothing means zeros."""

    guidance: float | None
    """By how much predictions are guided away from the negative prompt; None if they are not."""

    steps: int
    guidance_scale: float
    width: int
    height: int
    seeds: tuple[int, ...]
    controls: tuple[Control, ...]
    decode: bool
    strength: float
    given: DiffusionInputs
    skipped_layers: tuple[int, ...] = ()
    references: tuple[tuple[int, int], ...] = ()
    """(width, height) of each picture that the denoiser sees beside the latents."""
    asked: tuple[int, int] | None = None
    """(width, height) that pictures are scaled and cut to at last; None if that is what is made."""

    remarks: tuple[str, ...] = ()
    """Warnings: what of the call was changed, or has no effect."""

    video: Video | None = None
    """None for pictures."""

    @property
    def guided(self) -> bool:
        """Whether there is a half without the prompt."""
        return self.guidance is not None

    def without_adapters(self) -> tuple[Request, dict[str, float]]:
        """Return the call without comments and `<lora:NAME:STRENGTH>` in its prompts, and the adapters that they name.

        Raises InputError if the prompts of a batch differ in that: adapters hold for the whole batch.
        """
        read = [[adapters_in(without_comments(text)) for text in texts] for texts in self.prompts]
        named = [first for (_, first), *_ in read]
        differ = any(own not in ({}, first) for (_, first), *others in read for _, own in others)
        if differ or any(other != named[0] for other in named):
            raise InputError(
                "the prompts of one call name different adapters",
                where="prompt",
                hint="Adapters hold for a whole batch: make a call for each set of them.",
            )
        prompts = tuple(tuple(text for text, _ in texts) for texts in read)
        return replace(self, prompts=prompts), named[0]

    def as_inputs(self) -> dict[str, Any]:
        """Return inputs that make these pictures again; pictures given in memory are named by their digest."""
        written = {
            name: value for name in self.given.model_fields_set if (value := getattr(self.given, name)) is not None
        }
        for name in ("image", "mask", "reference", "latents"):
            if name in written:
                value = written[name]
                written[name] = [_name(item) for item in value] if isinstance(value, list) else _name(value)
        if "control" in written:
            written["control"] = [
                {
                    **control.model_dump(exclude={*_PICTURES}, exclude_defaults=True),
                    **{name: _name(value) for name in _PICTURES if (value := getattr(control, name)) is not None},
                }
                for control in self.controls
            ]
        return {
            **written,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "width": self.asked[0] if self.asked else self.width,
            "height": self.asked[1] if self.asked else self.height,
            "seed": self.seeds[0] if len(self.seeds) == 1 else list(self.seeds),
        }


def _check_guidance_options(inputs: DiffusionInputs, architecture: Architecture, *, guided: bool) -> None:
    """Refuse options of guidance that are of other families, or would have no effect."""
    for name, families in (("cfg_normalization", "Z-Image and Lumina-Image 2.0"), ("cfg_truncation", "Z-Image")):
        if getattr(inputs, name) is None:
            continue
        if name not in architecture.guidance_options:
            raise InputError(f"is for {families}", where=name, hint="Leave it out.")
        if not guided:
            raise InputError("no effect without guidance", where=name, hint="Set a larger guidance_scale.")


def _guided_hint(architecture: Architecture) -> str:
    """Say how a model gets what an option for classifier-free guidance needs."""
    if not architecture.negatives:
        return "Leave it out: the model has its guidance built in."
    return f"It is for classifier-free guidance: set a larger {architecture.guided_by}, or leave it out."


def _check_sizes(inputs: DiffusionInputs, architecture: Architecture) -> None:
    """Refuse what tells a denoiser of sizes and scores, if this one is not told."""
    for name in _SIZES:
        if name not in architecture.size_options and getattr(inputs, name) != type(inputs).model_fields[name].default:
            raise InputError(
                f"no effect with this model, {architecture.name}",
                where=name,
                hint="It tells some models of Stable Diffusion XL of sizes or scores: leave it out.",
            )


def _check_interval(inputs: DiffusionInputs, architecture: Architecture, *, guided: bool) -> None:
    """Refuse an interval of guidance that is empty, or that would have no effect."""
    if (inputs.guidance_start, inputs.guidance_stop) == (0, 1):
        return
    where = "guidance_start" if inputs.guidance_start else "guidance_stop"
    if not guided:
        raise InputError(
            "no effect, since this model runs without an unguided half",
            where=where,
            hint=_guided_hint(architecture),
        )
    if inputs.guidance_start >= inputs.guidance_stop:
        raise InputError(
            f"guidance would end at {inputs.guidance_stop:g}, before it begins", where=where,
            hint="Set guidance_stop above guidance_start.",
        )  # fmt: skip


def _name(value: Any) -> str:
    if hasattr(value, "tobytes") and not isinstance(value, Image.Image):  # latents as an array
        import hashlib

        return "sha256:" + hashlib.sha256(value.tobytes()).hexdigest()
    return picture_name(value)


def make_request(
    inputs: DiffusionInputs,
    architecture: Architecture,
    size: tuple[int, int] | None,
    references: tuple[tuple[int, int], ...] = (),
) -> Request:
    """Fill in what is left out; `size` is (width, height) of the picture to start from, or to be like.

    Raises InputError for what the model cannot do, and for what would have no effect.
    """
    prompts = [inputs.prompt] if isinstance(inputs.prompt, str) else list(inputs.prompt)
    defaults, multiple = architecture.defaults, architecture.multiple
    scale = defaults.guidance_scale if inputs.guidance_scale is None else inputs.guidance_scale
    guidance = architecture.guidance(inputs, scale)
    binning = _binning(inputs, architecture)
    floored = size if binning or size is None else _floor(size, multiple)
    default_width, default_height = floored or architecture.sides
    asked = inputs.width or default_width, inputs.height or default_height
    made = binned(*asked, binning) if binning else asked
    _check_prompts(inputs, architecture)
    if inputs.true_cfg_scale is not None and architecture.guided_by != "true_cfg_scale":
        raise InputError(
            "is for FLUX.1, whose guidance_scale is built in, and Qwen-Image",
            where="true_cfg_scale",
            hint="Set guidance_scale.",
        )
    if inputs.max_sequence_length is not None and architecture.length is None:
        raise InputError(
            "counts the tokens of T5, which the model has not", where="max_sequence_length", hint="Leave it out."
        )
    if inputs.instruction is not None and not architecture.instructed:
        raise InputError(
            "is for models that are told something before each prompt: Sana and Lumina-Image 2.0",
            where="instruction",
            hint="Leave it out.",
        )
    if inputs.guidance_rescale and guidance is None:
        raise InputError("no effect without guidance", where="guidance_rescale", hint=_guided_hint(architecture))
    _check_guidance_options(inputs, architecture, guided=guidance is not None)
    _check_interval(inputs, architecture, guided=guidance is not None)
    _check_sizes(inputs, architecture)
    if inputs.decode and inputs.denoising_end is not None:
        raise InputError(
            "latents that a refiner is to finish make no picture", where="decode", hint="Leave denoising_end out."
        )
    strength = getattr(inputs, "strength", None)
    remarks: list[str] = []
    request = Request(
        prompts=_each("prompt", prompts, _others(inputs, "prompt", architecture), prompts, inputs.count),
        negatives=_negatives(inputs, architecture, prompts, guided=guidance is not None),
        guidance=guidance,
        steps=len(_levels(inputs)) or inputs.steps or defaults.steps,
        guidance_scale=scale,
        width=_side("width", made[0], architecture, remarks),
        height=_side("height", made[1], architecture, remarks),
        asked=asked if made != asked else None,
        seeds=seeds_of(inputs.seed, len(prompts) * inputs.count),
        controls=_controls(inputs, architecture),
        decode=inputs.denoising_end is None if inputs.decode is None else inputs.decode,
        strength=defaults.strength if strength is None else strength,
        skipped_layers=_skipped(inputs, architecture, guided=guidance is not None),
        references=references,
        given=inputs,
    )
    return replace(request, remarks=(*remarks, *architecture.remarks(request)))


def _levels(inputs: DiffusionInputs) -> Sequence[float]:
    """Return the timesteps or levels of noise that a call gives, if it does."""
    if inputs.timesteps is not None and inputs.sigmas is not None:
        raise InputError("given beside timesteps, and each says it all", where="sigmas", hint="Leave one of them out.")
    return inputs.timesteps or inputs.sigmas or ()


def _binning(inputs: DiffusionInputs, architecture: Architecture) -> int | None:
    """Return the side of the square in the list of sizes, if one of them is to be made."""
    if not inputs.resolution_binning:
        return None
    if architecture.bins is None:
        raise InputError(
            "the model has no list of sizes that it was trained on",
            where="resolution_binning",
            hint="It is for Sana and PixArt: leave it out.",
        )
    return architecture.bins


_COUNTS = {1: "one text encoder", 2: "two text encoders"}


def _check_prompts(inputs: DiffusionInputs, architecture: Architecture) -> None:
    """Refuse prompts for text encoders that the model does not have."""
    for number in (2, 3):
        for name in (f"prompt_{number}", f"negative_prompt_{number}"):
            if getattr(inputs, name) is not None and architecture.prompts < number:
                raise InputError(f"the model has {_COUNTS[architecture.prompts]}", where=name, hint="Leave it out.")


def _skipped(inputs: DiffusionInputs, architecture: Architecture, *, guided: bool) -> tuple[int, ...]:
    """Return the layers that skip-layer guidance leaves out."""
    where, given = "skip_guidance_layers", inputs.skip_guidance_layers
    if given is None:
        return ()
    if not architecture.layers:
        raise InputError(
            "the model's layers cannot be left out",
            where=where,
            hint="It is for Stable Diffusion 3, with the transform 'layer-skipping', which the task adds.",
        )
    if not guided:
        raise InputError("no effect without guidance", where=where, hint=f"Set {architecture.guided_by} above 1.")
    wrong = [layer for layer in given if not 0 <= layer < architecture.layers]
    if wrong:
        raise InputError(f"there is no layer {wrong[0]}", where=where, hint=f"Give 0 to {architecture.layers - 1}.")
    return tuple(given)


def _others(inputs: DiffusionInputs, name: str, architecture: Architecture) -> list[str | list[str] | None]:
    """Return what a call gives the text encoders after the first."""
    return [getattr(inputs, f"{name}_{number}") for number in range(2, architecture.prompts + 1)]


def _negatives(
    inputs: DiffusionInputs, architecture: Architecture, prompts: Sequence[str], *, guided: bool
) -> tuple[Texts, ...] | None:
    """Return the negative prompt of each picture; refuse one that would do nothing."""
    negative, others = inputs.negative_prompt, _others(inputs, "negative_prompt", architecture)
    given = next((text for text in (negative, *others) if text is not None), None)
    if given is not None and not architecture.negatives:
        raise InputError(
            "the model has its guidance built in, and takes no negative prompt",
            where="negative_prompt",
            hint="Leave it out.",
        )
    if given is not None and given != "" and not guided:
        raise InputError(
            "no effect without guidance",
            where="negative_prompt",
            hint=f"Set {architecture.guided_by} above 1, or leave the negative prompt out.",
        )
    if not guided or (given is None and architecture.zero_negative):
        return None
    first = negative if isinstance(negative, list) else [negative or ""] * len(prompts)
    return _each("negative_prompt", first, others, prompts, inputs.count)


def _each(
    name: str,
    first: Sequence[str],
    others: Sequence[str | Sequence[str] | None],
    prompts: Sequence[str],
    count: int,
) -> tuple[Texts, ...]:
    """Return a text for each text encoder, for each picture; those that are not given are the first."""
    columns = [
        list(first), *([other] * len(prompts) if isinstance(other, str) else list(other or first) for other in others)
    ]  # fmt: skip
    for number, texts in enumerate(columns, 1):
        label = name if number == 1 else f"{name}_{number}"
        if len(texts) != len(prompts):
            what = label.replace("_", " ")
            raise InputError(f"{len(texts)} {what}s for {len(prompts)} prompts", where=label, hint="Give one for each.")
    return tuple(texts for texts in zip(*columns, strict=True) for _ in range(count))


def _floor(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    width, height = size
    return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple


def _side(name: str, pixels: int, architecture: Architecture, remarks: list[str]) -> int:
    """Return a width or height that the model can make."""
    multiple, longest = architecture.multiple, architecture.longest_side
    if longest is not None and pixels > longest:
        raise InputError(
            f"{pixels} is more than the {longest} pixels a side that the model has places for",
            where=name,
            hint="Set width and height.",
        )
    if architecture.rounds_sizes and pixels % multiple:
        lower = max(pixels // multiple * multiple, multiple)
        remarks.append(f"{name} = {pixels} is made {lower}: this model takes multiples of {multiple}")
        return lower
    check_side(name, pixels, multiple)
    return pixels


def check_side(name: str, pixels: int, multiple: int) -> None:
    """Raise InputError, with the nearest sizes, for a width or height that is not a multiple of so many pixels."""
    if pixels % multiple:
        lower = max(pixels // multiple * multiple, multiple)
        raise InputError(
            f"{pixels} is not a multiple of {multiple}",
            where=name,
            hint=f"The nearest sizes are {lower} and {lower + multiple}.",
        )


def seeds_of(seed: int | list[int] | None, pictures: int) -> tuple[int, ...]:
    """Return a seed for each picture: those given, or the one given and the numbers after it."""
    if isinstance(seed, list):
        if len(seed) != pictures:
            raise InputError(f"{len(seed)} seeds for {pictures} pictures", where="seed", hint="Give one for each.")
        return tuple(seed)
    first = fresh_seed() if seed is None else seed
    return tuple(first + number for number in range(pictures))


def _controls(inputs: DiffusionInputs, architecture: Architecture) -> tuple[Control, ...]:
    given = tuple(inputs.control or ())
    roles = architecture.conditioned(len(given))
    if architecture.stacks_condition:
        _check_stacked(given, architecture)
    elif len(given) != len(roles) or bool(given) != bool(architecture.controlnets):
        raise InputError(
            f"{len(given)} given for {len(architecture.controlnets)} ControlNets in the pipeline",
            where="control",
            hint='A ControlNet comes by [load.parts]: controlnet = "FOLDER", controlnet_1 = ...; give one for each.',
        )
    for role, control in zip(roles, given, strict=True):
        if control.start >= control.end:
            raise InputError(f"start = {control.start:g} is not before end = {control.end:g}", where="control")
        _check_kind(role, control, architecture.modes(role))
        _check_mask(role, control, architecture)
    return given


def _check_stacked(given: tuple[Control, ...], architecture: Architecture) -> None:
    """Refuse anything but one condition that counts in the whole run."""
    if len(given) != 1:
        raise InputError(
            f"{len(given)} given, and {architecture.name} of this kind sees one beside the latents",
            where="control",
            hint="Give one.",
        )
    [control] = given
    if (control.scale, control.start, control.end) != (1, 0, 1):
        raise InputError(
            f"{architecture.name} of this kind sees the condition in each step, and as it is",
            where="control.scale, control.start, control.end",
            hint="Leave them out: they are for ControlNets.",
        )


def _check_mask(role: str, control: Control, architecture: Architecture) -> None:
    """Refuse a mask that a ControlNet has no use for, and one that paints without one."""
    paints, around = architecture.paints(role), architecture.paints_around(role)
    if paints and control.mask is None:
        raise InputError(
            f"the {role} is for inpainting, and there is no mask", where="control.mask",
            hint="Give one: white is painted anew, black stays.",
        )  # fmt: skip
    if control.mask is not None and not paints and not around:
        raise InputError(f"the {role} takes no mask", where="control.mask", hint="Leave it out.")
    if control.around is not None and not around:
        raise InputError(
            f"the {role} takes no picture beside its condition", where="control.around", hint="Leave it out."
        )
    if around and (control.mask is None) != (control.around is None):
        raise InputError(
            f"the {role} paints in a picture by a mask, and one of them is missing",
            where="control.mask, control.around",
            hint="Give both, or neither.",
        )


def _check_kind(role: str, control: Control, modes: int | None) -> None:
    """Refuse a mode that a ControlNet has not, and a union without one."""
    if modes is None and control.mode is not None:
        raise InputError(
            f"the {role} is for one kind of condition, and takes no mode", where="control.mode", hint="Leave it out."
        )
    if modes is not None and (control.mode is None or control.mode >= modes):
        given = "nothing says which" if control.mode is None else f"it has no {control.mode}"
        raise InputError(
            f"the {role} is for {modes} kinds of conditions, and {given}",
            where="control.mode",
            hint=f"Give a number from 0 to {modes - 1}, as the ControlNet's card says.",
        )
