"""FLUX.2 klein (Black Forest Labs 2026): folded latents, three layers of Qwen3, and pictures beside the latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Defaults, OpenEncoder, PromptEncoder, Task, Texts
from ovforge_diffusion.architectures.flow import begin_flow, grid, sequence_length
from ovforge_diffusion.chat import ChatTemplate
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.resizing import scaled
from ovforge_diffusion.sequence import SequenceEncoder

if TYPE_CHECKING:
    import openvino as ov

    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["Flux2", "states_of"]

Array = NDArray[np.float32]

_QWEN = "text_encoder"
_LAYERS = (9, 18, 27)
"""Layers of Qwen3 whose states the transformer takes, one beside the other."""
_APART = 10
"""How far pictures lie apart, as the first of a token's four places."""
_LARGEST, _SHORTEST, _LONGEST = 1024 * 1024, 64, 8
"""Pixels that a picture is scaled down to, its least side, and the greatest ratio of its sides."""


class Flux2(Architecture):
    """FLUX.2 klein: guided, or distilled, which then takes neither a guidance scale nor a negative prompt."""

    name = "FLUX.2 klein"
    normalizes_latents = True
    channel_axis = 2
    text_encoders = (_QWEN,)
    sequence_encoders = (_QWEN,)
    default_size = 64
    length = 512
    rounds_sizes = True
    folding = 2
    references = 10
    noise_at_full_strength = False

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.sides = (self.default_size * self.factor,) * 2
        self.channels = int(self.config.get("in_channels", 128))
        self.check_channels()
        if self.decoding.mean is None:
            raise ModelError(
                "it has no statistics of latents (bn_running_mean_data, bn_running_var_data)",
                where="vae_decoder/config.json",
                hint="Convert the model as optimum-intel or ovforge does.",
            )
        layers = self.configs.get(_QWEN, {}).get("num_hidden_layers")
        if isinstance(layers, int) and layers < max(_LAYERS):
            raise ModelError(
                f"has {layers} layers, and FLUX.2 klein takes the states after layers "
                f"{', '.join(map(str, _LAYERS[:-1]))} and {_LAYERS[-1]}",
                where=_QWEN,
                hint="Take the text encoder of the same model.",
            )
        self.negatives = not context.bundle.index.get("is_distilled", False)
        self._embeds = bool(self.config.get("guidance_embeds", False))
        self._assets = context.bundle.assets

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A Flux2Transformer2DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "Flux2Transformer2DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of Flux2KleinPipeline and Flux2KleinInpaintPipeline."""
        return Defaults(50, 8.0 if task == "inpainting" else 4.0, 0.8)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return Qwen3, which reads a prompt as what somebody says."""
        tokenizer, model, _ = opened(_QWEN)
        chat = ChatTemplate(self._assets, "tokenizer")
        encoder = SequenceEncoder(tokenizer, model, _QWEN, states_of(model, self.configs.get(_QWEN, {})))
        return _Prompts(encoder, chat, options.prompts == "weighted")

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Guide away from the negative prompt, which is empty by default, unless the model is distilled."""
        return scale if scale > 1 and self.negatives else None

    def remarks(self, request: Request) -> list[str]:
        """Say that a guidance scale does nothing for a distilled model."""
        given = request.given.guidance_scale
        if self.negatives or self._embeds or given is None or given <= 1:
            return []
        return ["guidance_scale has no effect: this model is distilled"]

    def sample_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Return (pictures, tokens, channels)."""
        return (pictures, height * width, self.channels)

    packed_shape = sample_shape

    def pack(self, latents: Array) -> Array:
        """Return a token for each of the folded latents, (pictures, tokens, channels)."""
        return latents.reshape(*latents.shape[:2], -1).transpose(0, 2, 1)

    def unpack(self, latents: Array, height: int, width: int) -> Array:
        """Return (pictures, channels, height, width) again."""
        return latents.transpose(0, 2, 1).reshape(len(latents), -1, height, width)

    def kept(self, mask: Array) -> Array:
        """Return the mean of the four pixels in the middle of each latent: bilinear, as diffusers resizes masks."""
        side = self.factor
        squares = mask.reshape(1, mask.shape[1] // side, side, mask.shape[2] // side, side)
        middle = slice(side // 2 - 1, side // 2 + 1)
        means: Array = squares[:, :, middle, :, middle].mean(axis=(2, 4), dtype=np.float32)
        return means

    def limited(self, image: Image.Image) -> Image.Image:
        """Return it with a megapixel at most."""
        if image.width * image.height <= _LARGEST:
            return image
        scale = math.sqrt(_LARGEST / (image.width * image.height))
        return scaled(image, int(image.width * scale), int(image.height * scale))

    def shown(self, image: Image.Image) -> Image.Image:
        """Return it with a megapixel at most, and cut to multiples of the model's, as Flux2ImageProcessor does."""
        short, long = sorted(image.size)
        if short < max(_SHORTEST, self.multiple) or long > _LONGEST * short:
            raise InputError(
                f"is {image.width}x{image.height}",
                where="image",
                hint=f"Give pictures of {max(_SHORTEST, self.multiple)} pixels a side or more, whose sides differ by "
                f"{_LONGEST} times at most.",
            )
        image = self.limited(image)
        width, height = (side // self.multiple * self.multiple for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def size_beside(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Make pictures of the size of the first one that is shown."""
        return sizes[0]

    def timestep(self, timestep: float) -> float:
        """Return the share of noise, from 0 to 1: what the transformer multiplies by 1000 again."""
        return timestep / 1000

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the guidance scale for each row if the model takes it, and the places of tokens."""
        rows = halves * len(request.prompts)
        guidance = {"guidance": np.full(rows, request.guidance_scale, np.float32)} if self._embeds else {}
        sizes = ((request.width, request.height), *request.references)
        side = self.factor
        places = np.concatenate(
            [grid(number * _APART, high // side, wide // side, 4) for number, (wide, high) in enumerate(sizes)]
        )
        text = np.zeros((sequence_length(request.given.max_sequence_length, self.length), 4), np.float32)
        text[:, 3] = np.arange(len(text))
        return guidance, {"img_ids": places, "txt_ids": text}

    def foreseen_halves(self, inputs: Mapping[str, Any]) -> int:
        """Return two if there is guidance, and an unguided half."""
        return 1 if not self.negatives else super().foreseen_halves(inputs)

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run of evenly spread levels, shifted by the number of the picture's tokens and of the steps."""
        tokens, sigmas = size[0] * size[1], np.linspace(1.0, 1 / steps, steps).tolist()
        return begin_flow(scheduler, steps, strength, tokens=tokens, sigmas=sigmas, mu=_shift(tokens, steps))

    def notes(self) -> list[str]:
        """Return nothing: every model of the family has statistics of latents."""
        return []


def states_of(model: ov.Model | ov.CompiledModel, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the states that the transformer takes.

    optimum-intel 2.2 calls the embeddings of a Qwen3ForCausalLM `last_hidden_state`, and each layer's states by the
    number of the layer before it. Its own pipeline reads them by these names, and so takes states of other layers.
    """
    names, layers = {name for port in model.outputs for name in port.names}, config.get("num_hidden_layers")
    early = f"hidden_states.{layers}" not in names and f"hidden_states.{int(layers or 0) - 1}" in names
    return [f"hidden_states.{layer - early}" for layer in _LAYERS]


def _shift(tokens: int, steps: int) -> float:
    """Return mu as its makers fitted it: between lines for 10 and for 200 steps, above 4300 tokens the latter."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    slope = (many - (8.73809524e-05 * tokens + 1.89833333)) / 190
    return slope * steps + many - 200 * slope


class _Prompts(PromptEncoder):
    """Qwen3's states of each prompt, filled up to their full length, which the transformer sees too."""

    def __init__(self, encoder: SequenceEncoder, chat: ChatTemplate, weighted: bool) -> None:
        self._encoder, self._chat, self._weighted = encoder, chat, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width)."""
        length = sequence_length(request.given.max_sequence_length, Flux2.length)
        words, lost = unweighted([each[0] for each in texts], self._weighted, "FLUX.2")
        asked = [self._chat.question(text, thinking=False) for text in words]
        with timings.span("text_encoder"):
            states, notes = self._encoder.encode(asked, length, timings)
        return {"encoder_hidden_states": states}, notes + lost
