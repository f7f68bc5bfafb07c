"""Sana (Xie et al. 2024): linear attention over latents of 32 x 32 pixels, and Gemma 2, which reads an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, RandomStream, Sampling, Scheduler, TaskContext
from ovforge.errors import ConfigError
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
from ovforge_diffusion.architectures.flow import sequence_length
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.sequence import SequenceEncoder, SequenceTokenizer, stacked

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["Sana", "SanaSprint", "instruction_of", "tokens_left_out"]

Array = NDArray[np.float32]

_GEMMA = "text_encoder"
_INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
"""What stands before each prompt that is followed: complex_human_instruction of diffusers' SanaPipeline."""

_LONGEST_INSTRUCTION = 100_000

_BINS = {16: 512, 32: 1024, 64: 2048, 128: 4096}
"""Side of latents -> side of the square of its list of sizes."""


def instruction_of(request: Request) -> str:
    """Return what stands before each prompt that is followed; may be empty."""
    given = request.given.instruction
    return _INSTRUCTION if given is None else given


def tokens_left_out(tokenizer: SequenceTokenizer, instruction: str) -> int:
    """Return how many tokens are left out after the first one of a prompt that follows an instruction.

    The instruction's last token counts as the prompt's own, as in diffusers.
    """
    return len(tokenizer.cut(instruction, _LONGEST_INSTRUCTION)[0]) - 2 if instruction else 0


class Sana(Architecture):
    """Sana, from text."""

    name = "Sana"
    shifts_latents = False
    tasks: ClassVar[tuple[Task, ...]] = ("text-to-image",)
    text_encoders = (_GEMMA,)
    sequence_encoders = (_GEMMA,)
    default_size = 32
    length = 300
    instructed = True

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.multiple = self.factor * int(self.config.get("patch_size", 1))
        self.check_channels()
        self.given_channels = int(self.config.get("out_channels") or self.channels)
        self.bins = _BINS.get(self.size // self.factor)
        self._scale = np.float32(float(self.config.get("timestep_scale", 1.0)))
        self.encodes_conditions = bool(self.controlnets)

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A SanaTransformer2DModel that takes no guidance."""
        return _is_sana(bundle) and not bundle.configs[cls.denoiser].get("guidance_embeds")

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of SanaPipeline."""
        return Defaults(20, 4.5)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return Gemma 2, which reads prompts in lower case."""
        tokenizer, model, _ = opened(_GEMMA)
        return _Prompts(tokenizer, SequenceEncoder(tokenizer, model, _GEMMA), weighted=options.prompts == "weighted")

    def condition(self, given: Condition, request: Request) -> dict[str, NDArray[Any]]:
        """Return latents of a picture."""
        return {"controlnet_cond": given.likeliest(given.pixels * np.float32(2) - np.float32(1))}

    def timestep(self, timestep: float) -> float:
        """Return it in the transformer's own scale."""
        return float(np.float32(timestep) * self._scale)


class SanaSprint(Sana):
    """Sana-Sprint (Chen et al. 2025): a consistency model of one to four steps, whose guidance is an input."""

    name = "Sana-Sprint"
    tasks = ("text-to-image", "image-to-image")
    negatives = False

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.refuse_controlnets("ControlNets go with Sana, and not with Sana-Sprint")
        self.guidance_measure = float(self.config.get("guidance_embeds_scale", 0.1))

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A SanaTransformer2DModel that takes guidance."""
        return _is_sana(bundle) and bool(bundle.configs[cls.denoiser].get("guidance_embeds"))

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of SanaSprintPipeline and SanaSprintImg2ImgPipeline."""
        return Defaults(2, 4.5, 0.6)

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Return none: the transformer takes the scale itself."""
        return None

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the guidance scale for each row, in the transformer's own measure."""
        scales = np.full(len(request.prompts), request.guidance_scale, np.float32)
        return {"guidance": scales * np.float32(self.guidance_measure)}, {}

    def timestep(self, timestep: float) -> float:
        """Return the share of noise, from 0 to 1, of an angle in radians."""
        return float(_share(timestep))

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run along angles. Raises ConfigError for a scheduler of another kind."""
        inner = scheduler.start(steps, strength)
        deviation = getattr(inner, "sigma_data", None)
        if deviation is None:
            raise ConfigError(
                "Sana-Sprint samples along angles, which this scheduler does not",
                where="scheduler",
                hint="Leave it out, or set scheduler = 'scm'.",
            )
        return _Angles(inner, float(deviation))


class _Angles:
    """A run along angles, as TrigFlow has it, of a transformer of straight flows (Chen et al. 2025, section 3.1).

    The scheduler's latents have the deviation `deviation`, the transformer's 1.
    """

    def __init__(self, inner: Sampling, deviation: float) -> None:
        self._inner, self._deviation = inner, np.float32(deviation)
        self.timesteps = inner.timesteps
        self.first = inner.first
        self.init_noise_sigma = inner.init_noise_sigma * deviation

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return latents of a straight flow."""
        return latents / self._deviation * _length(_share(self.timesteps[index]))

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return the scheduler's latents of a picture's, of deviation 1."""
        return self._inner.add_noise(original * self._deviation, noise, index)

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the scheduler's next latents, and after the last step the picture's."""
        share = _share(self.timesteps[index])
        seen = self.scale_input(latents, index)
        way, square = np.float32(1 - 2 * share), np.float32(1 - 2 * share + 2 * share**2)
        turned = (way * seen + square * output) / _length(share) * self._deviation
        made = self._inner.step(turned.astype(np.float32, copy=False), index, latents, rng)
        return made / self._deviation if index + 1 == len(self.timesteps) else made


def _is_sana(bundle: CompiledModels) -> bool:
    return bundle.configs.get(Sana.denoiser, {}).get("_class_name") == "SanaTransformer2DModel"


def _share(angle: float) -> np.float32:
    """Return the share of noise in a straight flow that an angle in radians stands for."""
    sine, cosine = np.sin(np.float32(angle)), np.cos(np.float32(angle))
    return np.float32(sine / (cosine + sine))


def _length(share: np.float32) -> np.float32:
    return np.float32(np.sqrt(share**2 + (np.float32(1) - share) ** 2))


class _Prompts(PromptEncoder):
    """Gemma 2's states of each prompt: of its first token, and of those after the instruction."""

    def __init__(self, tokenizer: SequenceTokenizer, encoder: SequenceEncoder, *, weighted: bool) -> None:
        self._tokenizer, self._encoder, self._weighted = tokenizer, encoder, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and which of them count, (prompts, tokens).

        What fills up a prompt of diffusers' is masked, and changes nothing: it is left out here.
        """
        length = sequence_length(request.given.max_sequence_length, Sana.length)
        instruction = instruction_of(request)
        plain, lost = unweighted([each[0] for each in texts], self._weighted, "Sana")
        words = [text.lower().strip() for text in plain]
        rows: list[Array | None] = [None] * len(words)
        notes: list[str] = []
        with timings.span("text_encoder"):
            for avoided in (False, True):
                mine = [number for number, each in enumerate(negative) if bool(each) == avoided]
                told = "" if avoided else instruction
                read, said = self._read([words[number] for number in mine], length, timings, told)
                notes += said
                for number, row in zip(mine, read, strict=True):
                    rows[number] = row
        states, mask = stacked([row for row in rows if row is not None])
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}, notes + lost

    def _read(
        self, words: Sequence[str], length: int, timings: Timings, instruction: str
    ) -> tuple[list[Array], list[str]]:
        """Return states of up to `length` tokens for each text after an instruction, and what did not fit."""
        if not words:
            return [], []
        dropped = range(1, 1 + tokens_left_out(self._tokenizer, instruction))
        return self._encoder.encode_each([instruction + text for text in words], length, timings, dropped=dropped)
