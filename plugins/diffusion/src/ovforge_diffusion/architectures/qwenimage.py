"""Qwen-Image (Wu et al. 2025): packed latents, Qwen2.5-VL, which reads the prompt, and guidance that keeps norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
from ovforge.errors import InputError
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
from ovforge_diffusion.architectures.flow import SIDE, begin_flow, packed, sequence_length, unpacked
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.sequence import SequenceEncoder, stacked

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["DROPPED", "LONGEST", "TEMPLATE", "QwenImage"]

Array = NDArray[np.float32]

_QWEN = "text_encoder"
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What a prompt is put into: prompt_template_encode of diffusers' QwenImagePipeline."""
DROPPED = 34
"""Tokens before the prompt, whose states the transformer does not see."""
LONGEST = 1024


class QwenImage(Architecture):
    """Qwen-Image. A negative prompt, which may be empty, switches guidance on; `true_cfg_scale` says how far."""

    name = "Qwen-Image"
    normalizes_latents = True
    channel_axis = 2
    text_encoders = (_QWEN,)
    sequence_encoders = (_QWEN,)
    default_size = 128
    length = 512
    guided_by = "true_cfg_scale"
    keeps_norm = True
    rounds_sizes = True
    noise_at_full_strength = False
    controls_prompt = True
    several_conditions = True

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.multiple = self.factor * SIDE
        self.sides = (self.default_size * self.factor,) * 2
        self.channels = int(self.config.get("in_channels", 64))
        self.check_channels(self.latent_channels * SIDE**2)
        self.encodes_conditions = bool(self.controlnets)

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A QwenImageTransformer2DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "QwenImageTransformer2DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of QwenImagePipeline and its kin: the scale is that of `true_cfg_scale`."""
        return Defaults(50, 4.0, 0.6)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return Qwen2.5-VL, which reads a prompt as what is to be described."""
        tokenizer, model, _ = opened(_QWEN)
        return _Prompts(SequenceEncoder(tokenizer, model, _QWEN), weighted=options.prompts == "weighted")

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Guide away from the negative prompt, if there is one. Raises InputError for a scale without one."""
        given = inputs.true_cfg_scale
        if given is not None and given > 1 and inputs.negative_prompt is None:
            raise InputError(
                "no effect without a negative prompt",
                where="true_cfg_scale",
                hint='Give negative_prompt, which may be "", or leave true_cfg_scale out.',
            )
        scale = self.defaults.guidance_scale if given is None else given
        return scale if scale > 1 and inputs.negative_prompt is not None else None

    def foreseen_halves(self, inputs: Mapping[str, Any]) -> int:
        """Return two if calls have a negative prompt."""
        scale = inputs.get("true_cfg_scale", self.defaults.guidance_scale)
        unguided = isinstance(scale, int | float) and scale <= 1
        return 1 if unguided or inputs.get("negative_prompt") is None else 2

    def remarks(self, request: Request) -> list[str]:
        """Say that a guidance scale does nothing."""
        if request.given.guidance_scale is None:
            return []
        return ["guidance_scale has no effect: this model is guided by negative_prompt and true_cfg_scale"]

    def sample_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Return (pictures, tokens, channels)."""
        return (pictures, (height // SIDE) * (width // SIDE), self.channels)

    packed_shape = sample_shape

    def pack(self, latents: Array) -> Array:
        """Return a token for each square of 2 x 2 latents, (pictures, tokens, channels * 4)."""
        return packed(latents)

    def unpack(self, latents: Array, height: int, width: int) -> Array:
        """Return (pictures, channels, height, width) again."""
        return unpacked(latents, height, width)

    def timestep(self, timestep: float) -> float:
        """Return the share of noise, from 0 to 1: what the transformer multiplies by 1000 again."""
        return timestep / 1000

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the sides in tokens, (pictures,): of what is made, and of each picture beside it."""
        width, height = np.array([(request.width, request.height), *request.references]).T // self.multiple
        return {}, {"height": height, "width": width}

    def condition(self, given: Condition, request: Request) -> dict[str, NDArray[Any]]:
        """Return latents of a picture, packed, drawn; for inpainting the likeliest ones, and what stays of the mask.

        These diffusers draws with torch's global generator, which no seed of a call decides.
        """
        if self.paints(given.role):
            return {"controlnet_cond": self.pack(self.painted(given))}
        return {"controlnet_cond": self.pack(given.drawn(given.pixels * np.float32(2) - np.float32(1)))}

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run of evenly spread levels, shifted by the number of the picture's tokens."""
        tokens = (size[0] // SIDE) * (size[1] // SIDE)
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
        return begin_flow(scheduler, steps, strength, tokens=tokens, sigmas=sigmas)

    def notes(self) -> list[str]:
        """Return nothing: every model of the family has statistics of latents."""
        return []


class _Prompts(PromptEncoder):
    """Qwen2.5-VL's states of each prompt, and which of them count."""

    def __init__(self, encoder: SequenceEncoder, *, weighted: bool) -> None:
        self._encoder, self._weighted = encoder, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and 1 for each that counts, (prompts, tokens)."""
        length = sequence_length(request.given.max_sequence_length, QwenImage.length, LONGEST)
        words, lost = unweighted([each[0] for each in texts], self._weighted, QwenImage.name)
        with timings.span("text_encoder"):
            asked = [TEMPLATE.format(text) for text in words]
            read, notes = self._encoder.encode_each(asked, length, timings, dropped=range(DROPPED))
        return filled(read), notes + lost


def filled(read: Sequence[Array]) -> dict[str, NDArray[Any]]:
    """Return the denoiser's inputs of the states of each text, (tokens, width), filled up to the longest."""
    states, mask = stacked(read)
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask.astype(np.int64)}
