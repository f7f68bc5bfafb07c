"""Z-Image and Z-Image-Turbo (Tongyi-MAI 2025): one stream of picture and text, and a language model that reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
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
from ovforge_diffusion.architectures.flow import begin_flow, sequence_length
from ovforge_diffusion.chat import ChatTemplate
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.sequence import SequenceEncoder, before_last
from ovforge_sampling import linspace

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["MULTIPLE", "ZImage", "filled"]

Array = NDArray[np.float32]

_QWEN = "text_encoder"
_SIDE = 2
"""Latents along each side of what is one token."""

MULTIPLE = 32
"""Tokens of a picture, and of a text, are filled up to a multiple of it by learned ones."""


class ZImage(Architecture):
    """Z-Image. Its guidance counts from 0, and acts above it: at 0 there is none, as Turbo wants it."""

    name = "Z-Image"
    text_encoders = (_QWEN,)
    sequence_encoders = (_QWEN,)
    default_size = 128
    latent_scale = (0.3611, 0.1159)
    length = 512
    guidance_options = ("cfg_normalization", "cfg_truncation")

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.multiple = self.factor * _SIDE
        self.check_channels()
        self._assets = context.bundle.assets
        self.encodes_conditions = bool(self.controlnets)

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A ZImageTransformer2DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "ZImageTransformer2DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of ZImagePipeline and its kin."""
        return Defaults(50, 5.0, 1.0 if task == "inpainting" else 0.6)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return Qwen3, which reads a prompt as what somebody says."""
        tokenizer, model, _ = opened(_QWEN)
        chat = ChatTemplate(self._assets, "tokenizer")
        encoder = SequenceEncoder(tokenizer, model, _QWEN, before_last(model))
        return _Prompts(encoder, chat, self, weighted=options.prompts == "weighted")

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Return the way from one half to the other: diffusers counts it from the prompt on, so that 0 means none."""
        return scale + 1 if scale > 0 else None

    def foreseen_halves(self, inputs: Mapping[str, Any]) -> int:
        """Return two if there is guidance."""
        scale = inputs.get("guidance_scale", self.defaults.guidance_scale)
        return 1 if isinstance(scale, int | float) and scale <= 0 else 2

    def paints_around(self, role: str) -> bool:
        """Say whether a ControlNet takes more than latents of a condition, as newer ones do."""
        return int(self.configs[role].get("control_in_dim") or self.channels) > self.channels

    def condition(self, given: Condition, request: Request) -> dict[str, NDArray[Any]]:
        """Return latents of a picture, and for a ControlNet that can also paint what stays of another; zeros for none.

        What stays is 1 in the mask, and grey is painted over in the picture.
        """
        latents = given.likeliest(given.pixels * np.float32(2) - np.float32(1))
        if given.around is None or given.mask is None:
            more = int(self.configs[given.role].get("control_in_dim") or self.channels) - self.channels
            return {"controlnet_cond": np.pad(latents, ((0, 0), (0, more), (0, 0), (0, 0)))}
        stays = given.likeliest((given.around * np.float32(2) - np.float32(1)) * (given.mask < 0.5))
        kept = given.each(np.float32(1) - self.kept(given.mask))
        return {"controlnet_cond": np.concatenate([latents, kept, stays], axis=1)}

    def timestep(self, timestep: float) -> float:
        """Return the share of the picture, from 0 to 1."""
        return float((np.float32(1000) - np.float32(timestep)) / np.float32(1000))

    def predicted(self, output: Array) -> Array:
        """Return the way from the picture to the noise: the transformer gives that from the noise to the picture."""
        return -output

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run of evenly spread levels, shifted by the number of the picture's tokens."""
        tokens = (size[0] // _SIDE) * (size[1] // _SIDE)
        return begin_flow(scheduler, steps, strength, tokens=tokens, sigmas=linspace(1, 1 / steps, steps).tolist())

    def places(self, request: Request, texts: Sequence[int]) -> NDArray[np.int64]:
        """Return (text token, row, column) of a picture's tokens beside texts of so many, (texts, tokens, 3).

        A picture stands after its text; what fills up its tokens stands at 0.
        """
        height, width = request.height // self.multiple, request.width // self.multiple
        tokens = height * width
        places = np.zeros((len(texts), filled(tokens), 3), np.int64)
        places[:, :tokens, 0] = np.array(texts)[:, None] + 1
        places[:, :tokens, 1] = np.repeat(np.arange(height), width)
        places[:, :tokens, 2] = np.tile(np.arange(width), height)
        return places


class _Prompts(PromptEncoder):
    """Qwen3's states of each prompt, and the places of all tokens, which depend on the prompt's length."""

    def __init__(self, encoder: SequenceEncoder, chat: ChatTemplate, architecture: ZImage, *, weighted: bool) -> None:
        self._encoder, self._chat, self._architecture, self._weighted = encoder, chat, architecture, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), which of them count, and places, (prompts, tokens, 3)."""
        length = sequence_length(request.given.max_sequence_length, ZImage.length)
        words, lost = unweighted([each[0] for each in texts], self._weighted, "Z-Image")
        with timings.span("text_encoder"):
            read, notes = self._encoder.encode_each([self._chat.question(text) for text in words], length, timings)
        full = [filled(len(row)) for row in read]
        shape = len(read), max(full)
        states = np.zeros((*shape, read[0].shape[1]), np.float32)
        mask = np.full(shape, np.finfo(np.float32).min, np.float32)
        places = np.zeros((*shape, 3), np.int64)
        for number, (row, end) in enumerate(zip(read, full, strict=True)):
            states[number, : len(row)] = row
            mask[number, : len(row)] = 0
            places[number, :end, 0] = np.arange(1, end + 1)  # what fills up the batch stays at 0, which hides it
        return {
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "txt_ids": places,
            "img_ids": self._architecture.places(request, full),
        }, notes + lost


def filled(tokens: int) -> int:
    """Return how many tokens a text or a picture of so many is filled up to."""
    return tokens + -tokens % MULTIPLE
