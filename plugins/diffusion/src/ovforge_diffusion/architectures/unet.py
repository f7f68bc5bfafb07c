"""Stable Diffusion 1, 2 and XL: a UNet (Rombach et al. 2022, Podell et al. 2023), also for inpainting.

Models with guidance built in (latent consistency models) take an embedding of its scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, Embedder, Sampling, Scheduler, TaskContext
from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Defaults, OpenEncoder, PromptEncoder, Task, Texts
from ovforge_diffusion.overrides import overridden
from ovforge_diffusion.residuals import RESIDUALS, residual_shapes, unet_residuals
from ovforge_diffusion.text import DEFAULT_LENGTH, TextEncoder, TextEncoders

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["GUIDANCE", "StableDiffusion", "StableDiffusionXL"]

GUIDANCE = "timestep_cond"
"""The UNet's input for an embedded guidance scale: diffusers' name."""

STATES = "encoder_hidden_states"


class StableDiffusion(Architecture):
    """Stable Diffusion 1 and 2, their inpainting models, and latent consistency models made of them."""

    name = "Stable Diffusion 1 and 2"
    denoiser = "unet"
    sample = "sample"
    timestep_rows = False
    shifts_latents = False
    penultimate: ClassVar[bool] = False
    """Whether text states are those before the last layer."""

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        latent = self.latent_channels
        self.channels = int(self.config.get("in_channels", 4))
        if self.channels not in (latent, 2 * latent + 1):
            raise ModelError(
                f"a UNet with {self.channels} input channels does not fit latents of {latent} channels",
                where="unet/config.json",
                hint=f"Expected {latent}, or {2 * latent + 1} for inpainting.",
            )
        self.masked = self.channels != latent
        width = self.config.get("cross_attention_dim")
        self._context = width if isinstance(width, int) else None
        self._guidance_width: int | None = self.config.get("time_cond_proj_dim")
        self._embed = _guidance_embedder(context) if self._guidance_width else None
        pipeline = str(context.bundle.index.get("_class_name") or "LatentConsistencyModelPipeline")
        self._consistency = bool(self._guidance_width) and "LatentConsistency" in pipeline
        self.negatives = not self._guidance_width
        self.prompts = len(self.encoders)
        self._grid: int = self.factor * 2 ** (len(self.config.get("block_out_channels", (0,) * 4)) - 1)

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A UNet, whatever else it is."""
        return True

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of StableDiffusionPipeline and its kin."""
        return Defaults(50, 7.5, 1.0 if task == "inpainting" else 0.8)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return CLIP's text encoders, side by side."""
        encoders = []
        for role in self.encoders:
            tokenizer, model, learned = opened(role)
            encoders.append(TextEncoder(tokenizer, model, penultimate=self.penultimate, learned=learned))
        return _Prompts(
            TextEncoders(encoders, weighted=options.prompts == "weighted", chunks=options.long_prompts == "chunks"),
            self.encoders[-1] if self.penultimate else None,
        )

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Guidance is built in, or it is classifier-free."""
        return scale if self.negatives and scale > 1 else None

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the embedding of the guidance scale, for UNets that take it."""
        if self._embed is None:
            return {}, {}
        return {GUIDANCE: np.tile(self._embed(request.guidance_scale), (halves * len(request.prompts), 1))}, {}

    def input_shapes(
        self, rows: int, size: tuple[int, ...], options: DiffusionOptions, inputs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return the UNet's shapes, with those of what ControlNets add."""
        if self._context is None or options.long_prompts == "chunks":  # states of any length
            return None
        if self.config.get("resnet_time_scale_shift") == "scale_shift":
            return None  # for fixed shapes in float32, OpenVINO 2026.4 ends the process while it compiles such a UNet
        sample = (rows, self.channels, *size)
        length = self.configs.get(self.encoders[0], {}).get("max_position_embeddings", DEFAULT_LENGTH)
        shapes: dict[str, tuple[int, ...]] = {"sample": sample, "timestep": (1,), STATES: (rows, length, self._context)}
        if self._guidance_width:
            shapes[GUIDANCE] = (rows, self._guidance_width)
        if self.controlnets:
            residuals = self._residual_shapes(sample)
            return None if residuals is None else shapes | residuals
        return shapes

    def control_shapes(
        self, role: str, denoiser: Mapping[str, tuple[int, ...]], pixels: tuple[int, int]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of a ControlNet's inputs, beside a UNet of fixed ones."""
        config, (rows, _, *size) = self.configs[role], denoiser["sample"]
        names = ["timestep", STATES]
        names += ["text_embeds", "time_ids"] if config.get("addition_embed_type") else []
        return {
            "sample": (rows, self.latent_channels, *size),
            "controlnet_cond": (rows, config.get("conditioning_channels", 3), *pixels),
            **{name: denoiser[name] for name in names},
        }

    def residuals(self, role: str, outputs: Iterable[str]) -> dict[str, str]:
        """Return the UNet's input -> the ControlNet's output that is added there: all of them, by their names."""
        return unet_residuals(outputs)

    def _residual_shapes(self, sample: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
        """Return shapes of what ControlNets give the UNet; None if the configs do not tell."""
        nets = [self.configs.get(role, {}) for role in self.controlnets]
        same = all(
            net.get("_class_name") == "ControlNetModel" and net.get("cross_attention_dim") == self._context
            for net in nets
        )
        shapes = residual_shapes(self.config, sample)
        return shapes if same and len(shapes) - 1 == self.config.get(RESIDUALS) else None

    @property
    def grid(self) -> int:
        """Pixels that the UNet's own levels want."""
        return self._grid

    def overrides(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Return what the pipelines of Stable Diffusion 1 and 2 repair of a scheduler's config."""
        if not config or self._consistency or self.controlnets:
            return {}
        return overridden(config, inpainting=self.task == "inpainting", own=own)

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run.

        Latent consistency sampling spreads its steps over the part of the run only for latent consistency models, as
        their pipeline in diffusers does; in other pipelines its first steps are left out, as for any scheduler, whether
        the UNet has its guidance built in or not.
        """
        if strength == 1 or self._consistency or not getattr(scheduler, "spreads_steps", False):
            return scheduler.start(steps, strength)
        sampling = scheduler.start(steps)
        sampling.first = steps - min(int(steps * strength), steps)
        if sampling.first == len(sampling.timesteps):
            raise InputError(
                f"{strength} of {steps} steps is less than one", where="strength", hint="Give more of either."
            )
        return sampling


class StableDiffusionXL(StableDiffusion):
    """SDXL, base and refiner: two text encoders, and numbers that tell of sizes."""

    name = "Stable Diffusion XL"
    normalizes_latents = True
    penultimate = True

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        bundle = context.bundle
        aesthetic = bool(bundle.index.get("requires_aesthetics_score", False))
        if task == "inpainting":  # these pipelines of diffusers look at fewer of the autoencoder's statistics
            self.encoding = replace(self.encoding, mean=None, deviation=None)
            self.decoding = replace(self.decoding, mean=None, deviation=None) if self.controlnets else self.decoding
        self._numbers = 5 if aesthetic else 6  # that tell of sizes, or of sizes and an aesthetic score
        self.size_options = ("original_size", "crop", "negative_original_size")
        if aesthetic:
            self.size_options += ("negative_crop", "aesthetic_score", "negative_aesthetic_score")
        else:
            self.size_options += ("target_size", "negative_target_size")
            self.size_options += ("negative_crop",) if task == "text-to-image" else ()
        self.zero_negative = bool(bundle.index.get("force_zeros_for_empty_prompt", True))

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A UNet that takes pooled text states and numbers."""
        return bundle.configs.get(cls.denoiser, {}).get("addition_embed_type") == "text_time"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of StableDiffusionXLPipeline and its kin."""
        controlled = bool(self.controlnets)
        if task == "inpainting":
            return Defaults(50, 5.0 if controlled else 7.5, 0.9999)
        return Defaults(50, 5.0, 0.8 if controlled else 0.3)

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the numbers that tell of sizes, as well."""
        rows, shared = super().constants(request, halves)
        negative, positive = self._time_ids(request)
        each = [negative, *[positive] * (halves - 1)] if halves > 1 else [positive]
        rows["time_ids"] = np.repeat(each, len(request.prompts), axis=0)
        return rows, shared

    def _time_ids(self, request: Request) -> NDArray[np.float32]:
        """Return the numbers for both halves, float32 (2, 5 or 6): the one to avoid, the one to follow.

        Which of the negative ones count is each pipeline's own in diffusers.
        """
        given = request.given
        size = (request.height, request.width)
        original, target = given.original_size or size, given.target_size or size
        first = (*original, *given.crop)
        avoided, away = given.negative_original_size, given.negative_target_size
        rows: list[tuple[float, ...]]
        if self._numbers == 5:
            other = (*(avoided or original), *given.negative_crop)
            rows = [(*other, given.negative_aesthetic_score), (*first, given.aesthetic_score)]
        elif self.task != "text-to-image":
            rows = [(*(avoided or original), *given.crop, *(away or target)), (*first, *target)]
        elif avoided and away:
            rows = [(*avoided, *given.negative_crop, *away), (*first, *target)]
        elif avoided or away:
            raise InputError(
                "has an effect from text only if both are given",
                where="negative_original_size, negative_target_size",
                hint="Give both, or neither.",
            )
        else:
            rows = [(*first, *target)] * 2
        return np.array(rows, np.float32)

    def input_shapes(
        self, rows: int, size: tuple[int, ...], options: DiffusionOptions, inputs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return the UNet's shapes, with those of the pooled states and the numbers."""
        shapes = super().input_shapes(rows, size, options, inputs)
        width = self.configs.get(self.encoders[-1], {}).get("projection_dim")
        if shapes is None or width is None:
            return None
        return shapes | {"text_embeds": (rows, width), "time_ids": (rows, self._numbers)}

    def overrides(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Return nothing: these pipelines take the file as it stands."""
        return {}


class _Prompts(PromptEncoder):
    """CLIP's states, side by side; `pooled` is the encoder whose pooled output the UNet takes, if it takes one."""

    def __init__(self, encoders: TextEncoders, pooled: str | None) -> None:
        self._encoders, self._pooled = encoders, pooled

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and with a pooled output (prompts, width)."""
        made, warnings = self._encoders.encode(texts, timings, negative)
        inputs: dict[str, NDArray[Any]] = {STATES: made.states}
        if self._pooled is not None:
            if made.pooled[-1] is None:
                raise ModelError("the last text encoder has no output 'text_embeds'", where=self._pooled)
            inputs["text_embeds"] = made.pooled[-1]
        return inputs, warnings

    def learned(self, texts: Sequence[Texts]) -> list[list[str]]:
        """Return the learned words that each prompt used."""
        return self._encoders.learned(texts)


def _guidance_embedder(context: TaskContext) -> Embedder:
    """Return what computes the UNet's input for a guidance scale."""
    if GUIDANCE not in context.embedders:
        raise ModelError(
            f"the UNet takes an embedding of the guidance scale, {GUIDANCE}, and no plugin here computes it",
            where="unet",
            hint="Run: pip install ovforge-lcm. If it is installed, see: ovforge plugins doctor",
        )
    return context.embedders[GUIDANCE]
