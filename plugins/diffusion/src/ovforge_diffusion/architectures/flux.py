"""FLUX.1 dev, schnell, Fill, Kontext, Canny and Depth (Black Forest Labs 2024): packed latents, a CLIP and a T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import (
    Architecture,
    Condition,
    Defaults,
    OpenEncoder,
    PromptEncoder,
    Task,
    Texts,
)
from ovforge_diffusion.architectures.flow import SIDE, begin_flow, grid, packed, sequence_length, unpacked
from ovforge_diffusion.prompts import plain, weighs
from ovforge_diffusion.resizing import scaled
from ovforge_diffusion.sequence import SequenceEncoder
from ovforge_diffusion.text import TextEncoder, TextEncoders

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["Flux"]

Array = NDArray[np.float32]

_CLIP, _T5 = "text_encoder", "text_encoder_2"
KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""Widths and heights of pictures that Kontext was trained on."""


class Flux(Architecture):
    """FLUX.1. Its guidance scale is an input of the transformer (dev), or built in (schnell).

    A negative prompt is followed with `true_cfg_scale` above 1, at two calls a step. Kontext sees a picture beside the
    latents, and makes an edited one; Canny and Depth see a condition, as further channels.
    """

    name = "FLUX.1"
    channel_axis = 2
    text_encoders = (_CLIP, _T5)
    sequence_encoders = (_T5,)
    prompts = 2
    default_size = 128
    latent_scale = (0.3611, 0.1159)
    length = 512
    guided_by = "true_cfg_scale"
    rounds_sizes = True
    noise_at_full_strength = False
    controls_prompt = True
    several_conditions = True

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.multiple = self.factor * SIDE
        self.sides = (self.default_size * self.factor,) * 2
        plain = self.latent_channels * SIDE**2
        self.channels = int(self.config.get("in_channels", 64))
        filling = 2 * plain + (self.factor * SIDE) ** 2
        if self.channels not in (plain, 2 * plain, filling):
            raise ModelError(
                f"a transformer with {self.channels} input channels does not fit latents of {self.latent_channels}",
                where="transformer/config.json",
                hint=f"Expected {plain}, {2 * plain} for FLUX.1 Canny and Depth, or {filling} for FLUX.1 Fill.",
            )
        self.masked = self.channels == filling
        self.stacks_condition = self.channels == 2 * plain
        if self.masked:
            self.defaults = self.own_defaults(context, Defaults(50, 30.0, 1.0))
        if self.pipeline_class.startswith("FluxKontext"):
            if self.channels != plain:
                raise ModelError(
                    f"FLUX.1 Kontext sees pictures as further tokens, and its transformer takes {self.channels} "
                    f"channels in place of {plain}",
                    where="transformer/config.json",
                    hint="Control LoRAs are for FLUX.1 dev: leave the adapter out, or take that model.",
                )
            self.references = 1
            self.defaults = self.own_defaults(context, Defaults(28, 3.5, 1.0))
        self._embeds = bool(self.config.get("guidance_embeds", False))
        if self.masked or self.references or self.stacks_condition:
            self.refuse_controlnets(
                "ControlNets go with FLUX.1 dev and schnell, not with Fill, Kontext, Canny or Depth"
            )
        self.encodes_conditions = self.stacks_condition or not all(map(self._shows, self.controlnets))
        missing = [role for role in self.text_encoders if role not in self.encoders]
        if missing:
            raise ModelError("the model lacks it, and FLUX.1 needs both of its text encoders", where=missing[0])

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A FluxTransformer2DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "FluxTransformer2DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of FluxPipeline and its kin."""
        return Defaults(28, 3.5 if task == "text-to-image" else 7.0, 0.6)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return CLIP, for the prompt as a whole, and T5."""
        tokenizer, model, learned = opened(_CLIP)
        clip = TextEncoder(tokenizer, model, penultimate=False, learned=learned, pooled="pooler_output")
        weighted = options.prompts == "weighted"
        # What is pooled is the first chunk, so that CLIP has nothing of more chunks.
        whole = TextEncoders([clip], weighted=weighted, chunks=False, reader="CLIP")
        return _Prompts(whole, SequenceEncoder(*opened(_T5)[:2], _T5), weighted=weighted)

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Guide away from a negative prompt, if there is one and true_cfg_scale says how far."""
        given = inputs.true_cfg_scale
        if given is None or given <= 1:
            return None
        if inputs.negative_prompt is None:
            raise InputError(
                "no effect without a negative prompt",
                where="true_cfg_scale",
                hint='Give negative_prompt, which may be "", or leave true_cfg_scale out.',
            )
        return given

    def foreseen_halves(self, inputs: Mapping[str, Any]) -> int:
        """Return two if calls have a negative prompt."""
        scale = inputs.get("true_cfg_scale")
        return 2 if isinstance(scale, int | float) and scale > 1 else 1

    def remarks(self, request: Request) -> list[str]:
        """Say that a guidance scale does nothing for a model that has no input for it."""
        if self._embeds or request.given.guidance_scale is None:
            return []
        return ["guidance_scale has no effect: this model's guidance is built in"]

    def sample_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Return (pictures, tokens, channels)."""
        return (pictures, self._tokens((height, width)), self.channels)

    def packed_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Return (pictures, tokens, channels of the latents)."""
        return (pictures, self._tokens((height, width)), self.latent_channels * SIDE**2)

    def pack(self, latents: Array) -> Array:
        """Return a token for each square of 2 x 2 latents, (pictures, tokens, channels * 4)."""
        return packed(latents)

    def unpack(self, latents: Array, height: int, width: int) -> Array:
        """Return (pictures, channels, height, width) again."""
        return unpacked(latents, height, width)

    def masked_extra(self, mask: Array, hidden: Array) -> Array:
        """Return the latents of what stays, and all pixels of the mask, packed: as FluxFillPipeline does."""
        pictures, _, height, width = mask.shape
        factor = self.factor
        pixels = mask.reshape(pictures, height // factor, factor, width // factor, factor).transpose(0, 2, 4, 1, 3)
        pixels = pixels.reshape(pictures, factor**2, height // factor, width // factor)
        return np.concatenate([self.pack(hidden), self.pack(pixels)], axis=2)

    def limited(self, image: Image.Image) -> Image.Image:
        """Return it as Kontext is to see it; other models take any number of pixels."""
        return self.shown(image) if self.references else image

    def shown(self, image: Image.Image) -> Image.Image:
        """Return it in the size that Kontext was trained on whose sides are most alike, as diffusers takes it."""
        width, height = (side // self.multiple * self.multiple for side in image.size)
        if not width or not height:
            raise InputError(
                f"{image.width}x{image.height} pixels are too few", where="image",
                hint=f"Give {self.multiple}x{self.multiple} at least.",
            )  # fmt: skip
        _, *sides = min((abs(width / height - wide / high), wide, high) for wide, high in KONTEXT_SIZES)
        width, height = (side // self.multiple * self.multiple for side in sides)
        return scaled(image, width, height)

    def timestep(self, timestep: float) -> float:
        """Return the share of noise, from 0 to 1: what the transformer multiplies by 1000 again."""
        return timestep / 1000

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the guidance scale for each row, and the places of tokens, which all rows share."""
        rows = halves * len(request.prompts)
        guidance = {"guidance": np.full(rows, request.guidance_scale, np.float32)} if self._embeds else {}
        sizes = ((request.width, request.height), *request.references)
        side = self.multiple
        places = np.concatenate(
            [grid(number, high // side, wide // side, 3) for number, (wide, high) in enumerate(sizes)]
        )
        text = np.zeros((sequence_length(request.given.max_sequence_length, self.length), 3), np.float32)
        return guidance, {"img_ids": places, "txt_ids": text}

    def condition(self, given: Condition, request: Request) -> dict[str, NDArray[Any]]:
        """Return latents of a picture, packed, or its pixels from -1 to 1 for XLabs', and what else a ControlNet takes.

        That is the guidance scale, which some take where the transformer has none and the other way round, and a mode.
        """
        config, pictures = self.configs[given.role], given.pictures
        pixels = given.pixels * np.float32(2) - np.float32(1)
        own: dict[str, NDArray[Any]] = {
            "controlnet_cond": given.each(pixels) if self._shows(given.role) else self.pack(given.drawn(pixels))
        }
        if given.mode is not None:
            own["controlnet_mode"] = np.full((pictures, 1), given.mode, np.int64)
        if config.get("guidance_embeds"):
            own["guidance"] = np.full(pictures, request.guidance_scale, np.float32)
        return own

    def _shows(self, role: str) -> bool:
        """Say whether a ControlNet takes pixels."""
        return self.configs.get(role, {}).get("conditioning_embedding_channels") is not None

    def input_shapes(
        self, rows: int, size: tuple[int, ...], options: DiffusionOptions, inputs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return none: the places of tokens have an axis for rows in some models, and none in others."""
        return None

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run of evenly spread levels, shifted by the number of the picture's tokens."""
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
        return begin_flow(scheduler, steps, strength, tokens=self._tokens(size), sigmas=sigmas)

    def _tokens(self, size: tuple[int, ...]) -> int:
        return (size[0] // SIDE) * (size[1] // SIDE)


class _Prompts(PromptEncoder):
    """T5's states, and CLIP's pooled ones."""

    def __init__(self, clip: TextEncoders, t5: SequenceEncoder, *, weighted: bool) -> None:
        self._clip, self._t5, self._weighted = clip, t5, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and pooled ones, (prompts, width)."""
        made, warnings = self._clip.encode([each[:1] for each in texts], timings, negative)
        if made.pooled[0] is None:
            raise ModelError("the text encoder has no output 'pooler_output'", where=_CLIP)
        length = sequence_length(request.given.max_sequence_length, Flux.length)
        words = [plain(each[1]) if self._weighted else each[1] for each in texts]
        with timings.span("text_encoder"):
            states, notes = self._t5.encode(words, length, timings)
        if self._weighted and any(weighs(text) for each in texts for text in each):
            notes.append("weights in prompts have no effect: FLUX.1's text encoders read the words without them")
        return {"encoder_hidden_states": states, "pooled_projections": made.pooled[0]}, warnings + notes

    def learned(self, texts: Sequence[Texts]) -> list[list[str]]:
        """Return the learned words that each prompt used."""
        return self._clip.learned([each[:1] for each in texts])
