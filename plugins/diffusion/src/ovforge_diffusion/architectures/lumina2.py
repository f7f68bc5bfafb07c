"""Lumina-Image 2.0 (Qin et al. 2025): one stream of text and picture, and Gemma 2, which reads a system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
from ovforge.errors import InputError
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Defaults, OpenEncoder, PromptEncoder, Task, Texts
from ovforge_diffusion.architectures.flow import begin_flow, sequence_length
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.sequence import SequenceEncoder, before_last, stacked

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["Lumina2", "before"]

Array = NDArray[np.float32]

_GEMMA = "text_encoder"
_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
"""What stands before each prompt that is followed: system_prompt of diffusers' Lumina2Pipeline."""
_BEGIN = " <Prompt Start> "


class Lumina2(Architecture):
    """Lumina-Image 2.0, from text. Guided predictions keep the norm of those with the prompt."""

    name = "Lumina-Image 2.0"
    tasks: ClassVar[tuple[Task, ...]] = ("text-to-image",)
    text_encoders = (_GEMMA,)
    sequence_encoders = (_GEMMA,)
    default_size = 128
    latent_scale = (0.3611, 0.1159)
    length = 256
    keeps_norm = True
    guidance_options = ("cfg_normalization",)
    instructed = True

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self._patch = int(self.config.get("patch_size", 2))
        self.multiple = self.factor * self._patch
        self.check_channels()
        lengths = [int(length) for length in self.config.get("axes_lens", (300, 512, 512))]
        self._words, self._side = lengths[0] - 1, min(lengths[1:])

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A Lumina2Transformer2DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "Lumina2Transformer2DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of Lumina2Pipeline."""
        return Defaults(30, 4.0)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return Gemma 2, whose states before the last layer count."""
        tokenizer, model, _ = opened(_GEMMA)
        encoder = SequenceEncoder(tokenizer, model, _GEMMA, before_last(model))
        return _Prompts(encoder, self, weighted=options.prompts == "weighted")

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Return by how much predictions are guided. Raises InputError for a norm that is neither kept nor let be."""
        if inputs.cfg_normalization not in (None, 0, 1):
            what = f"{inputs.cfg_normalization:g} times the norm cannot be kept by this model"
            raise InputError(what, where="cfg_normalization", hint="Give 1, its default, or 0.")
        return super().guidance(inputs, scale)

    def guidance_end(self, stop: float, steps: int) -> int:
        """Return the step at which guidance ends, as `cfg_trunc_ratio` of diffusers' pipeline has it."""
        return sum((number + 1) / steps <= stop for number in range(steps))

    def timestep(self, timestep: float) -> float:
        """Return the share of the picture, from 0 to 1."""
        return float(np.float32(1) - np.float32(timestep) / np.float32(1000))

    def predicted(self, output: Array) -> Array:
        """Return the way from the picture to the noise: the transformer gives that from the noise to the picture."""
        return -output

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run of evenly spread levels. diffusers shifts them by the number of channels, not of tokens."""
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
        return begin_flow(scheduler, steps, strength, tokens=self.channels, sigmas=sigmas)

    def words(self, request: Request) -> int:
        """Return how many tokens are read. Raises InputError for more tokens, of text or picture, than have places."""
        length = sequence_length(request.given.max_sequence_length, min(self.length, self._words))
        if length > self._words:
            raise InputError(
                f"{length} is out of range", where="max_sequence_length", hint=f"Give {self._words} at most."
            )
        for name, pixels in (("width", request.width), ("height", request.height)):
            if pixels // self.multiple > self._side:
                raise InputError(
                    f"{pixels} is out of range", where=name, hint=f"Give {self._side * self.multiple} at most."
                )
        return length

    def places(self, request: Request, texts: Sequence[int]) -> NDArray[np.int64]:
        """Return (text token, row, column) of a picture's tokens after texts of so many, (texts, tokens, 3)."""
        height, width = request.height // self.multiple, request.width // self.multiple
        places = np.zeros((len(texts), height * width, 3), np.int64)
        places[..., 0] = np.array(texts)[:, None]
        places[..., 1] = np.repeat(np.arange(height), width)
        places[..., 2] = np.tile(np.arange(width), height)
        return places


def before(instruction: str | None) -> str:
    """Return what stands before a prompt that is followed; None for the instruction of diffusers' pipeline."""
    return (_SYSTEM if instruction is None else instruction) + _BEGIN


class _Prompts(PromptEncoder):
    """Gemma 2's states of each prompt, and the places of all tokens, which depend on the prompt's length."""

    def __init__(self, encoder: SequenceEncoder, architecture: Lumina2, *, weighted: bool) -> None:
        self._encoder, self._architecture, self._weighted = encoder, architecture, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), which of them count, and places, (prompts, tokens, 3)."""
        length = self._architecture.words(request)
        words, lost = unweighted([each[0] for each in texts], self._weighted, "Lumina-Image 2.0")
        told = before(request.given.instruction)
        asked = [text if avoided else told + text for text, avoided in zip(words, negative, strict=True)]
        with timings.span("text_encoder"):
            read, notes = self._encoder.encode_each(asked, length, timings)
        states, mask = stacked(read)
        places = np.zeros((*mask.shape, 3), np.int64)
        places[..., 0] = np.arange(mask.shape[1])
        return {
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "txt_ids": places,
            "img_ids": self._architecture.places(request, [len(row) for row in read]),
        }, notes + lost
