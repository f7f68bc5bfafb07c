"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a transformer over picture and text, two CLIPs and a T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
from ovforge_diffusion.architectures.flow import begin_flow, sequence_length
from ovforge_diffusion.graph.layer_skipping import LAYERS, SKIPPED_LAYERS
from ovforge_diffusion.prompts import plain, weighs
from ovforge_diffusion.residuals import RESIDUALS
from ovforge_diffusion.sequence import SequenceEncoder
from ovforge_diffusion.text import DEFAULT_LENGTH, TextEncoder, TextEncoders

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["StableDiffusion3"]

_CLIPS = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"


class StableDiffusion3(Architecture):
    """Stable Diffusion 3 and 3.5. Without T5, its states are zeros, as in diffusers."""

    name = "Stable Diffusion 3 and 3.5"
    text_encoders = (*_CLIPS, _T5)
    sequence_encoders = (_T5,)
    default_size = 128
    latent_scale = (1.5305, 0.0609)
    length = 256

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self._patch = int(self.config.get("patch_size", 2))
        self.multiple = self.factor * self._patch
        self.longest_side = int(self.config.get("pos_embed_max_size") or 96) * self.multiple
        self.channels = int(self.config.get("in_channels", 16))
        if self.channels not in (self.latent_channels, 2 * self.latent_channels + 1):
            raise ModelError(
                f"a transformer with {self.channels} input channels does not fit latents of {self.latent_channels}",
                where="transformer/config.json",
                hint=f"Expected {self.latent_channels}, or {2 * self.latent_channels + 1} for inpainting.",
            )
        self.masked = self.channels != self.latent_channels
        missing = [role for role in _CLIPS if role not in self.encoders]
        if missing:
            raise ModelError("the model lacks it, and only T5 may be left out", where=missing[0])
        self.prompts = len(self.encoders)
        self.layers = int(self.config.get(LAYERS, 0))
        self._width = int(self.config.get("joint_attention_dim", 4096))
        self.encodes_conditions = bool(self.controlnets)
        if self.masked:
            self.refuse_controlnets("ControlNets go with Stable Diffusion 3 that was not made for inpainting")
        if task == "inpainting":
            # StableDiffusion3InpaintPipeline of diffusers decodes without the shift, which other pipelines add.
            self.decoding = replace(self.decoding, shift=0.0)

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """An SD3Transformer2DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "SD3Transformer2DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of StableDiffusion3Pipeline and its kin."""
        return Defaults(28 if task == "text-to-image" else 50, 7.0, 0.6)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return CLIP's text encoders, and T5."""
        clips = []
        for role in _CLIPS:
            tokenizer, model, learned = opened(role)
            clips.append(TextEncoder(tokenizer, model, penultimate=True, learned=learned))
        weighted = options.prompts == "weighted"
        t5 = SequenceEncoder(*opened(_T5)[:2], _T5) if _T5 in self.encoders else None
        both = TextEncoders(clips, weighted=weighted, chunks=options.long_prompts == "chunks", reader="CLIP")
        return _Prompts(both, t5, self._width, weighted=weighted)

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return which layers each row leaves out: the last half those of skip-layer guidance."""
        if not self.layers:
            return {}, {}
        skipped = np.zeros((halves, len(request.prompts), self.layers), np.bool_)
        if request.skipped_layers:
            skipped[-1, :, request.skipped_layers] = True
        return {SKIPPED_LAYERS: skipped.reshape(-1, self.layers)}, {}

    def condition(self, given: Condition, request: Request) -> dict[str, NDArray[Any]]:
        """Return latents of a picture, and zeros for the pooled text if the ControlNet was trained so.

        diffusers draws these latents with torch's global generator, which no seed of a call decides: here they are the
        likeliest ones. ControlNets that were trained without pooled text take latents that are not shifted, but for
        those for inpainting.
        """
        config = self.configs[given.role]
        unpooled = bool(config.get("force_zeros_for_pooled_projection", True))
        if self.paints(given.role):
            latents, unpooled = self.painted(given), True
        else:
            latents = given.likeliest(given.pixels * np.float32(2) - np.float32(1))
            if unpooled:
                latents = latents + np.float32(self.encoding.shift * self.encoding.factor)
        pooled = int(config.get("pooled_projection_dim", 2048))
        zeros = {"pooled_projections": np.zeros((given.pictures, pooled), np.float32)} if unpooled else {}
        return {"controlnet_cond": latents, **zeros}

    def control_shapes(
        self, role: str, denoiser: Mapping[str, tuple[int, ...]], pixels: tuple[int, int]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of a ControlNet's inputs, beside a transformer of fixed ones."""
        config, (rows, _, *size) = self.configs[role], denoiser["hidden_states"]
        names = ["hidden_states", "timestep", "pooled_projections"]
        names += [] if config.get("joint_attention_dim", 4096) is None else ["encoder_hidden_states"]
        channels = self.latent_channels + int(config.get("extra_conditioning_channels", 0))
        return {**{name: denoiser[name] for name in names}, "controlnet_cond": (rows, channels, *size)}

    def _residual_shapes(self, rows: int, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return shapes of what ControlNets give the transformer."""
        heads, width = self.config.get("num_attention_heads", 18), self.config.get("attention_head_dim", 64)
        names = {name for role in self.controlnets for name in self.residuals(role, ())}
        return {name: self.kept_shape(rows, size, heads * width) for name in names}

    def input_shapes(
        self, rows: int, size: tuple[int, ...], options: DiffusionOptions, inputs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return the transformer's shapes."""
        pooled = self.config.get("pooled_projection_dim")
        if options.long_prompts == "chunks" or not isinstance(pooled, int):
            return None
        if self.controlnets and not self.config.get(RESIDUALS):
            return None
        try:
            tokens = DEFAULT_LENGTH + sequence_length(inputs.get("max_sequence_length"), self.length)
        except InputError:  # the call says it
            return None
        return {
            **({SKIPPED_LAYERS: (rows, self.layers)} if self.layers else {}),
            "hidden_states": self.sample_shape(rows, *size),
            "timestep": (rows,),
            "encoder_hidden_states": (rows, tokens, self._width),
            "pooled_projections": (rows, pooled),
            **self._residual_shapes(rows, size),
        }

    def kept_shape(self, rows: int, size: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Return (rows, tokens, channels)."""
        return (rows, (size[0] // self._patch) * (size[1] // self._patch), channels)

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run, shifted by the number of the picture's tokens if the scheduler does that."""
        return begin_flow(scheduler, steps, strength, tokens=(size[0] // self._patch) * (size[1] // self._patch))


class _Prompts(PromptEncoder):
    """CLIP's states side by side, filled up to the width of T5's, and T5's after them."""

    def __init__(self, clips: TextEncoders, t5: SequenceEncoder | None, width: int, *, weighted: bool) -> None:
        self._clips, self._t5, self._width, self._weighted = clips, t5, width, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and pooled ones, (prompts, width)."""
        made, warnings = self._clips.encode([each[:2] for each in texts], timings, negative)
        pooled = [each for each in made.pooled if each is not None]
        if len(pooled) < len(_CLIPS):
            raise ModelError("a text encoder has no output 'text_embeds'", where=_CLIPS[0])
        length = sequence_length(request.given.max_sequence_length, StableDiffusion3.length)
        # Narrower than T5's, they are filled up; of a model in which they are wider, diffusers takes the first ones.
        states = np.zeros((*made.states.shape[:2], self._width), np.float32)
        kept = min(self._width, made.states.shape[2])
        states[..., :kept] = made.states[..., :kept]
        last = np.zeros((len(texts), length, self._width), np.float32)
        if self._t5 is not None:
            words = [plain(each[2]) if self._weighted else each[2] for each in texts]
            with timings.span("text_encoder"):
                last, notes = self._t5.encode(words, length, timings)
            warnings += notes
            if self._weighted and any(weighs(each[2]) for each in texts):
                warnings.append("weights in prompts act on CLIP; T5 reads the words without them")
        return {
            "encoder_hidden_states": np.concatenate([states, last], axis=1),
            "pooled_projections": np.concatenate(pooled, axis=1),
        }, warnings

    def learned(self, texts: Sequence[Texts]) -> list[list[str]]:
        """Return the learned words that each prompt used."""
        return self._clips.learned([each[:2] for each in texts])
