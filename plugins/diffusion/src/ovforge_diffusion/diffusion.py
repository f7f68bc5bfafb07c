"""What the tasks share: prompts -> embeddings -> denoising -> pictures, in numpy and OpenVINO."""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import Embedder, Progress, Sampling, Scheduler, TaskContext, ignore_progress
from ovforge.errors import InputError, ModelError
from ovforge.model import BatchGenerator, ImagesResult, Timings
from ovforge_diffusion.conditioning import ConditionPlan, Schedule, plan_conditions
from ovforge_diffusion.controls import condition
from ovforge_diffusion.examples import edges
from ovforge_diffusion.family import PREVIEW, Family
from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
from ovforge_diffusion.overrides import overridden
from ovforge_diffusion.request import Request, make_request
from ovforge_diffusion.text import DEFAULT_LENGTH, TextEncoder, TextEncoders, learned_tokens
from ovforge_diffusion.tokenizer import FileTokenizer, GraphTokenizer, Tokenizer, has_files
from ovforge_diffusion.unet import GUIDANCE, RESIDUALS, Denoiser, residual_shapes
from ovforge_diffusion.vae import Autoencoder

__all__ = ["Diffusion", "Start"]

Array = NDArray[np.float32]

SCHEDULER = "scheduler/scheduler_config.json"

_log = logging.getLogger("ovforge.diffusion")


@dataclass
class Start:
    """Where a run begins: noised latents, and the index of its first step.

    `extra` are the UNet's channels after the latents; `blend(latents, index)` is called after each step, `finish`
    with each picture made.
    """

    latents: Array
    first: int = 0
    extra: Array | None = None
    blend: Callable[[Array, int], Array] | None = None
    finish: Callable[[Image.Image], Image.Image] = lambda image: image


class Diffusion:
    """A task of the Stable Diffusion family; calls are served one at a time. Subclasses say where a run begins."""

    encodes: ClassVar[bool] = False
    """Whether the task takes a picture."""

    inpaints: ClassVar[bool] = False
    """Whether the task paints a part of a picture."""

    def __init__(self, options: DiffusionOptions, context: TaskContext) -> None:
        self._bundle, self._options = context.bundle, options
        self._context = context
        self.family = Family.of(context.bundle)
        self._embed_guidance = _guidance_embedder(self.family, context)
        self._lock = threading.Lock()
        self._text: TextEncoders | None = None
        self._denoiser: tuple[tuple[int, ...], Denoiser] | None = None
        preview = self._preview_model if self.family.previewing else None
        self.autoencoder = Autoencoder(self.family, self._decoder_model, self._encoder_model, options.tile, preview)
        self._fixed = self._expected(context.inputs) if options.static else None
        self._adapters = context.adapters
        self._tokenizers: dict[str, Future[Tokenizer]] = {}
        self._bundle.on_demand()  # a tokenizer whose files are there is not compiled
        if not options.low_memory:
            self._start_compiling()

    def _start_compiling(self) -> None:
        bundle, fixed = self._bundle, self._fixed
        bundle.start("unet", self._unet_shapes(fixed))  # the longest first
        for role in self.family.controlnets:
            bundle.start(role, self._control_shapes(role, fixed))
        for encoder in self.family.encoders:
            if has_files(bundle.assets, _tokenizer_of(encoder)):
                self._read_tokenizer(_tokenizer_of(encoder))
            else:
                bundle.start(_tokenizer_of(encoder))
            bundle.start(encoder)
        if self.encodes:
            bundle.start("vae_encoder", self._encoder_shapes(fixed and (3, *self._pixels(fixed))))
        for role in ("vae_decoder", PREVIEW) if self.family.previewing else ("vae_decoder",):
            bundle.start(role, self._decoder_shapes(fixed and (self.family.latent_channels, *fixed[2:])))

    def __call__(self, inputs: DiffusionInputs, progress: Callable[[Progress], None] = ignore_progress) -> ImagesResult:
        """Make pictures.

        Raises InputError for what the model cannot do, ModelError where it computes no numbers. What the progress
        callback raises ends the run.
        """
        with self._lock:
            request, adapters = self._requested(inputs)
            if not adapters:
                return self._made(inputs, request, progress)
            if self._adapters is None:
                raise InputError(
                    f"no adapters can be switched here, and the prompt names {', '.join(adapters)}",
                    where="prompt",
                    hint='Add each to the config as a transform with mode = "runtime".',
                )
            before = dict(self._adapters)
            self._adapters.set({**before, **adapters})
            try:
                return self._made(inputs, request, progress)
            finally:
                self._adapters.set(before)

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        """Return what the run starts from; each task has its own way."""
        raise NotImplementedError

    def _requested(self, inputs: DiffusionInputs) -> tuple[Request, dict[str, float]]:
        """Return the call with every default filled in, and the adapters that its prompts name."""
        request = make_request(inputs, self.family, self._size_of(inputs))
        if self._options.prompts == "weighted":
            return request.without_adapters()
        return request, {}

    def _made(self, inputs: DiffusionInputs, request: Request, progress: Callable[[Progress], None]) -> ImagesResult:
        timings = Timings()
        sampling = self._sampling(inputs, request.steps)
        progress(Progress("text encoding", 0, request.steps))
        schedule, lost = self._encode(request, sampling, timings)
        learned, unused = self._learned(request)
        self._released("tokenizer", "tokenizer_2", *self.family.encoders)
        rng = BatchGenerator(request.seeds)
        start = self._begin(inputs, request, sampling, rng, timings)
        self._released("vae_encoder")
        denoiser = self._denoiser_for(request, schedule.halves)  # waiting for compilation is not part of denoising
        with timings.span("denoise"):
            latents = self._denoise(request, sampling, schedule, start, denoiser, rng, timings, progress)
        del denoiser
        self._released("unet", *self.family.controlnets)
        images = []
        if request.decode:
            progress(Progress("decoding", 0, len(latents)))
            for number, row in enumerate(latents):
                with timings.span("vae_decoder"):
                    images.append(start.finish(self.autoencoder.decode(row)))
                progress(Progress("decoding", number + 1, len(latents)))
        self._released("vae_decoder", PREVIEW)
        return ImagesResult(
            timings=timings,
            provenance={"inputs": request.as_inputs(), **learned},
            warnings=lost + unused + self._statistics(),
            images=images,
            seeds=request.seeds,
            latents=latents,
        )

    def _conditions(self, number: int) -> dict[str, Any]:
        """Return what example `number` needs for the pipeline's ControlNets."""
        nets = self.family.controlnets
        return {"control": [{"image": edges(number, self.family.size)} for _ in nets]} if nets else {}

    # -- what subclasses say --------------------------------------------------------------------------------------

    def _size_of(self, inputs: DiffusionInputs) -> tuple[int, int] | None:
        """Return (width, height) of the picture that a run starts from; None if there is none."""
        return None

    def _sampling(self, inputs: DiffusionInputs, steps: int) -> Sampling:
        return self._make_scheduler().start(steps)

    def _partly(self, steps: int, strength: float) -> Sampling:
        """Begin a run that goes a part of the way only.

        Latent consistency sampling spreads its steps over that part for models with guidance built in, as diffusers'
        latent consistency pipeline does; for other models its first steps are left out, as for any scheduler.
        """
        scheduler = self._make_scheduler()
        if strength == 1 or self.family.guidance_width or not getattr(scheduler, "spreads_steps", False):
            return scheduler.start(steps, strength)
        sampling = scheduler.start(steps)
        sampling.first = steps - min(int(steps * strength), steps)
        if sampling.first == len(sampling.timesteps):
            raise InputError(
                f"{strength} of {steps} steps is less than one", where="strength", hint="Give more of either."
            )
        return sampling

    def _make_scheduler(self) -> Scheduler:
        def adjust(config: Mapping[str, Any], *, own: bool) -> Mapping[str, Any]:
            return {**config, **self._overrides(config, own=own)}

        return self._context.scheduler(adjust)

    def _overrides(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Return what of the model's scheduler config diffusers' pipeline for this task and model would change."""
        family = self.family
        if self._options.raw_scheduler or not config or family.guidance_width or family.time_ids or family.controlnets:
            return {}
        return overridden(config, inpainting=self.inpaints, own=own)

    def _statistics(self) -> list[str]:
        """Return a note if the autoencoder brings statistics of latents: not all programs apply them."""
        applied = self.family.decoding.mean and self.family.decoding.deviation
        return ["the autoencoder's latents_mean and latents_std are applied"] if applied else []

    def notes(self) -> list[str]:
        """Return what a plan should say: what is changed of the scheduler's config, and statistics of latents."""
        notes = self._statistics()
        config = self._bundle.scheduler_config()
        named = config.get("_class_name")
        said = json.loads(self._bundle.assets.get(SCHEDULER, b"{}")).get("_class_name", named)
        if said != named:
            notes.append(f"model_index.json names {named}, which counts, and scheduler_config.json {said}")
        changed = ", ".join(f"{key} = {str(value).lower()}" for key, value in self._overrides(config, own=True).items())
        if changed:
            notes.append(f"scheduler_config.json is read with {changed}, as diffusers' pipeline reads it")
        return notes

    # -- the parts ------------------------------------------------------------------------------------------------

    def latents_shape(self, request: Request) -> tuple[int, ...]:
        """Return (pictures, channels, height, width) of the latents."""
        factor = self.family.factor
        return (len(request.prompts), self.family.latent_channels, request.height // factor, request.width // factor)

    def _encode(self, request: Request, sampling: Sampling, timings: Timings) -> tuple[Schedule, list[str]]:
        """Return the conditions of each step, and warnings of what did not fit."""
        if self._text is None:
            self._text = self._text_encoders()
        weighted = self._options.prompts == "weighted"
        plan: ConditionPlan = plan_conditions(request, len(sampling.timesteps), weighted=weighted)
        conditions, lost = self._text.encode(plan.texts, timings, plan.negative)
        if self.family.time_ids and conditions.pooled is None:
            raise ModelError("the last text encoder has no output 'text_embeds'", where=self.family.encoders[-1])
        self._say("text states", conditions.states)
        return plan.schedule(conditions), lost + plan.warnings

    def _text_encoders(self) -> TextEncoders:
        taught, options = learned_tokens(self._bundle.assets), self._options
        encoders = [
            TextEncoder(
                self._tokenizer(_tokenizer_of(role)),
                self._bundle[role],
                penultimate=bool(self.family.time_ids),
                learned=taught.get(_tokenizer_of(role)),
            )
            for role in self.family.encoders
        ]
        return TextEncoders(encoders, weighted=options.prompts == "weighted", chunks=options.long_prompts == "chunks")

    def _tokenizer(self, role: str) -> Tokenizer:
        """Return the tokenizer of the model's files, or of its OpenVINO model if there are none."""
        if has_files(self._bundle.assets, role):
            return self._read_tokenizer(role).result()
        warnings.warn(
            f"{role}: the model has no tokenizer.json, nor vocab.json with merges.txt; its OpenVINO tokenizer may read "
            "rare letters and added tokens in another way than transformers",
            stacklevel=2,
        )
        return GraphTokenizer(self._bundle[role], learned_tokens(self._bundle.assets).get(role))

    def _read_tokenizer(self, role: str) -> Future[Tokenizer]:
        """Begin to read a tokenizer's files, which takes a while for 49,000 words; other models compile meanwhile."""
        if role not in self._tokenizers:
            pool = ThreadPoolExecutor(1, thread_name_prefix="ovforge-tokenizer")
            learned = learned_tokens(self._bundle.assets).get(role)
            self._tokenizers[role] = pool.submit(FileTokenizer, self._bundle.assets, role, learned)
            pool.shutdown(wait=False)
        return self._tokenizers[role]

    def _learned(self, request: Request) -> tuple[dict[str, list[str]], list[str]]:
        """Return the learned words that prompts used, for the provenance, and warnings of pictures that use none."""
        words = dict.fromkeys(word for taught in learned_tokens(self._bundle.assets).values() for word in taught)
        if not words or self._text is None:
            return {}, []
        negatives = request.negatives or request.prompts
        pairs = list(dict.fromkeys(zip(request.prompts, negatives, strict=True)))
        used = self._text.learned([prompt for pair in pairs for prompt in pair])
        unused = [
            f"the prompt {pair[0][0]!r} uses none of the learned words: {', '.join(words)}"
            for pair, mine, other in zip(pairs, used[::2], used[1::2], strict=True)
            if not mine and not other
        ]
        return {"learned_tokens": list(dict.fromkeys(word for each in used for word in each))}, unused

    def _denoise(
        self,
        request: Request,
        sampling: Sampling,
        schedule: Schedule,
        start: Start,
        denoiser: Denoiser,
        rng: BatchGenerator,
        timings: Timings,
        progress: Callable[[Progress], None],
    ) -> Array:
        """Return clean latents, float32 (pictures, channels, height / factor, width / factor)."""
        self._condition(request, schedule, denoiser)
        denoiser.check(sampling.timesteps)
        if start.extra is not None:
            denoiser.extra_channels(start.extra)
        steps = self._steps(request, sampling, start.first)
        latents = start.latents
        for number, index in enumerate(steps):
            before = time.perf_counter()
            if schedule.changes(number):
                self._change(schedule, number, denoiser)
            seen = sampling.scale_input(latents, index)
            scales = [c.scale * _counts(c, number, len(steps)) for c in request.controls]
            halves = self._predict(denoiser, seen, sampling.timesteps[index], scales, request, timings)
            output = _guided(halves, request, schedule.weights)
            with timings.span("denoise.scheduler"):
                latents = sampling.step(output, index, latents, rng)
                if start.blend is not None:
                    latents = start.blend(latents, index)
            if not np.isfinite(latents).all():
                raise ModelError(
                    f"step {number + 1} of {len(steps)} gave numbers that are not finite",
                    where="unet" if not np.isfinite(output).all() else "scheduler",
                    hint="Set device.precision = 'f32'; if it stays, the model's weights are damaged.",
                )
            if _log.isEnabledFor(logging.DEBUG):
                self._say(f"step {number + 1}/{len(steps)} t={sampling.timesteps[index]:g} prediction", output)
                self._say(f"step {number + 1}/{len(steps)} latents", latents, time.perf_counter() - before)
            preview = partial(self._preview, sampling, latents, index)
            progress(Progress("denoising", number + 1, len(steps), preview=preview))
        return latents

    def _steps(self, request: Request, sampling: Sampling, first: int) -> range:
        """Return the indexes of the steps to take: to the end, or to the part that the call names."""
        end = request.given.denoising_end
        last = len(sampling.timesteps)
        if end is not None:
            cutoff = round(self.family.train_timesteps * (1 - end))
            last = first + int((np.asarray(sampling.timesteps[first:]) >= cutoff).sum())
        if first >= last:
            raise InputError("the run has no step left", where="denoising_end", hint="Take more steps, or end later.")
        return range(first, last)

    def _condition(self, request: Request, schedule: Schedule, denoiser: Denoiser) -> None:
        """Set what holds for the whole run, and the first text."""
        family, halves, conditions = self.family, denoiser.halves, schedule.at(0)
        shared = {"encoder_hidden_states": denoiser.condition("encoder_hidden_states", conditions.states)}
        rows = len(conditions.states)
        if self._embed_guidance is not None:
            embedding = self._embed_guidance(request.guidance_scale)
            shared[GUIDANCE] = denoiser.condition(GUIDANCE, np.tile(embedding, (rows, 1)))
        if family.time_ids:
            assert conditions.pooled is not None
            shared["text_embeds"] = denoiser.condition("text_embeds", conditions.pooled)
            negative, positive = _time_ids(request, family)
            each = [negative, *[positive] * (halves - 1)] if halves > 1 else [positive]
            shared["time_ids"] = denoiser.condition("time_ids", np.repeat(each, rows // halves, axis=0))
        if request.controls:
            sample = tuple(denoiser.sample.shape)
            nets = {r: self._bundle.get(r, self._control_shapes(r, sample)) for r in family.controlnets}
            denoiser.control(nets, shared)
            pictures = len(request.prompts)
            for number, control in enumerate(request.controls):
                pixels = condition(control, request.width, request.height)
                denoiser.conditions_of(number, np.repeat(pixels[None], pictures, axis=0))

    def _change(self, schedule: Schedule, number: int, denoiser: Denoiser) -> None:
        """Set the text of a call of the network, if it differs from that of the call before."""
        conditions = schedule.at(number)
        denoiser.change("encoder_hidden_states", conditions.states)
        if self.family.time_ids:
            assert conditions.pooled is not None
            denoiser.change("text_embeds", conditions.pooled)

    def _predict(
        self,
        denoiser: Denoiser,
        seen: Array,
        timestep: float,
        scales: Sequence[float],
        request: Request,
        timings: Timings,
    ) -> list[Array]:
        """Run the UNet; a size that its skip connections cannot join is an input error."""
        grid = self.family.grid
        try:
            return denoiser.predict(seen, timestep, scales, timings)
        except RuntimeError as error:
            if request.width % grid or request.height % grid:
                self._denoiser = None
                raise InputError(
                    f"this model's UNet cannot work at {request.width}x{request.height}",
                    where="width, height",
                    hint=f"It was converted for multiples of {grid}; the diffusers loader converts for any size.",
                ) from error
            raise

    def _preview(self, sampling: Sampling, latents: Array, index: int) -> list[Image.Image]:
        """Return pictures of latents after step `index`, scaled to what they will be at the end."""
        last = index + 1 >= len(sampling.timesteps)
        seen = latents if last else sampling.scale_input(latents, index + 1)
        return [self.autoencoder.preview(row) for row in seen]

    # -- models and their shapes ------------------------------------------------------------------------------------

    def _expected(self, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the UNet's input shape for the calls that the config foresees; None if it foresees no one size."""
        family = self.family
        width, height, count = (
            inputs.get(name) or default
            for name, default in (("width", family.size), ("height", family.size), ("count", 1))
        )
        if not all(isinstance(value, int) and value > 0 for value in (width, height, count)):
            return None
        prompts = inputs.get("prompt")
        pictures = count * (len(prompts) if isinstance(prompts, list) else 1)
        guidance = inputs.get("guidance_scale", family.defaults["guidance_scale"])
        guided = not family.guidance_width and not (isinstance(guidance, int | float) and guidance <= 1)
        rows = pictures * (2 if guided and self._options.guidance == "joint" else 1)
        return (rows, family.channels, height // family.factor, width // family.factor)

    def _unet_shapes(self, sample: tuple[int, ...] | None) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of every input for a sample of this shape; None if it is not the expected one."""
        family = self.family
        if sample is None or sample != self._fixed or family.context is None:
            return None
        if self._options.long_prompts == "chunks":  # states of any length
            return None
        length = self._bundle.configs.get(family.encoders[0], {}).get("max_position_embeddings", DEFAULT_LENGTH)
        shapes = {"sample": sample, "timestep": (1,), "encoder_hidden_states": (sample[0], length, family.context)}
        if family.guidance_width:
            shapes[GUIDANCE] = (sample[0], family.guidance_width)
        if family.time_ids:
            width = self._bundle.configs.get(family.encoders[-1], {}).get("projection_dim")
            if width is None:
                return None
            shapes |= {"text_embeds": (sample[0], width), "time_ids": (sample[0], family.time_ids)}
        if family.controlnets:
            residuals = self._residual_shapes(sample)
            return None if residuals is None else shapes | residuals
        return shapes

    def _control_shapes(self, role: str, sample: tuple[int, ...] | None) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of a ControlNet's inputs, beside a UNet of fixed ones."""
        shapes = self._unet_shapes(sample)
        if sample is None or shapes is None:
            return None
        config, (rows, _, *size) = self._bundle.configs[role], sample
        names = ["timestep", "encoder_hidden_states"]
        names += ["text_embeds", "time_ids"] if config.get("addition_embed_type") else []
        return {
            "sample": (rows, self.family.latent_channels, *size),
            "controlnet_cond": (rows, config.get("conditioning_channels", 3), *self._pixels(sample)),
            **{name: shapes[name] for name in names},
        }

    def _residual_shapes(self, sample: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
        """Return shapes of what ControlNets give the UNet; None if the configs do not tell."""
        unet, family = self._bundle.configs.get("unet", {}), self.family
        nets = [self._bundle.configs.get(role, {}) for role in family.controlnets]
        same = all(
            net.get("_class_name") == "ControlNetModel" and net.get("cross_attention_dim") == family.context
            for net in nets
        )
        shapes = residual_shapes(unet, sample)
        return shapes if same and len(shapes) - 1 == unet.get(RESIDUALS) else None

    def _decoder_shapes(self, latents: tuple[int, ...] | None) -> dict[str, tuple[int, ...]] | None:
        """Return a fixed shape for latents (channels, height, width) of the expected size, or of its tiles."""
        fixed = self._fixed
        if latents is None or fixed is None:
            return None
        tile, factor = self.autoencoder.tile(*self._pixels(fixed)), self.family.factor
        sides = tuple(min(side, tile // factor) if tile else side for side in fixed[2:])
        return {"latent_sample": (1, latents[0], *sides)} if latents[1:] in (sides, fixed[2:]) else None

    def _encoder_shapes(self, pixels: tuple[int, ...] | None) -> dict[str, tuple[int, ...]] | None:
        fixed = self._fixed
        if pixels is None or fixed is None:
            return None
        tile = self.autoencoder.tile(*self._pixels(fixed))
        sides = tuple(min(side, tile) if tile else side for side in self._pixels(fixed))
        return {"sample": (1, 3, *sides)} if pixels[1:] in (sides, self._pixels(fixed)) else None

    def _pixels(self, sample: tuple[int, ...]) -> tuple[int, int]:
        return sample[2] * self.family.factor, sample[3] * self.family.factor

    def _decoder_model(self, shape: tuple[int, ...]) -> Any:
        return self._bundle.get("vae_decoder", self._decoder_shapes(shape[1:]))

    def _preview_model(self, shape: tuple[int, ...]) -> Any:
        return self._bundle.get(PREVIEW, self._decoder_shapes(shape[1:]))

    def _encoder_model(self, shape: tuple[int, ...]) -> Any:
        return self._bundle.get("vae_encoder", self._encoder_shapes(shape[1:]))

    def _denoiser_for(self, request: Request, halves: int) -> Denoiser:
        pictures, _, height, width = self.latents_shape(request)
        calls = halves if self._options.guidance == "split" else 1
        shape = (pictures, self.family.channels, height, width)
        key = (halves, calls, *shape)
        if self._denoiser is None or self._denoiser[0] != key:
            model = self._bundle.get("unet", self._unet_shapes((pictures * halves // calls, *shape[1:])))
            self._denoiser = (key, Denoiser(model, shape, self.family.latent_channels, halves, calls))
        return self._denoiser[1]

    def _released(self, *roles: str) -> None:
        """Free what is not needed any more in this run, if memory is to stay low."""
        if not self._options.low_memory:
            return
        if "unet" in roles:
            self._denoiser = None
        if "tokenizer" in roles:
            self._text = None
            self._tokenizers.clear()
        if "vae_encoder" in roles or "vae_decoder" in roles:
            self.autoencoder.release()
        for role in roles:
            if role in self._bundle:
                self._bundle.release(role)

    def _say(self, what: str, array: Array, seconds: float | None = None) -> None:
        """Write shape, statistics and time to the debug log."""
        if _log.isEnabledFor(logging.DEBUG):
            took = "" if seconds is None else f" in {seconds:.4f} s"
            _log.debug(
                "%s: %s %s min %.5g mean %.5g max %.5g std %.5g%s",
                what, list(array.shape), array.dtype, array.min(), array.mean(), array.max(), array.std(), took,
            )  # fmt: skip


def _guidance_embedder(family: Family, context: TaskContext) -> Embedder | None:
    """Return what computes the UNet's input for a guidance scale; None if it has no such input."""
    if not family.guidance_width:
        return None
    if GUIDANCE not in context.embedders:
        raise ModelError(
            f"the UNet takes an embedding of the guidance scale, {GUIDANCE}, and no plugin here computes it",
            where="unet",
            hint="Run: pip install ovforge-lcm. If it is installed, see: ovforge plugins doctor",
        )
    return context.embedders[GUIDANCE]


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _guided(halves: Sequence[Array], request: Request, weights: Array) -> Array:
    """Return the prediction that guidance makes of what the network gave; a new array if there is more than one.

    The first is the unconditional one. `weights`, float32 (halves - 1, pictures), says how strongly each of the others
    counts (composable diffusion, Liu et al. 2022).
    """
    if len(halves) == 1:
        return halves[0]
    without, *others = halves
    output = np.zeros_like(without)
    for along, weight in zip(others, weights, strict=True):
        output += (along - without) * weight[:, None, None, None]
    rescale = np.float32(request.given.guidance_rescale)
    deviation = _deviation(output + without) if rescale else None
    output *= np.float32(request.guidance_scale)
    output += without
    if deviation is not None:  # Lin et al. 2024, section 3.4
        ratio = deviation / _deviation(output)
        output *= rescale * ratio + (np.float32(1) - rescale)
    return output


def _deviation(values: Array) -> Array:
    """Return torch's standard deviation of each picture, (pictures, 1, 1, 1): by count - 1."""
    deviation: Array = values.std(axis=(1, 2, 3), keepdims=True, ddof=1, dtype=np.float32)
    return deviation


def _counts(control: Any, number: int, steps: int) -> bool:
    """Say whether a condition counts at a step, as diffusers' `controlnet_keep` does."""
    return not (number / steps < control.start or (number + 1) / steps > control.end)


def _time_ids(request: Request, family: Family) -> Array:
    """Return SDXL's numbers for both halves, float32 (2, 5 or 6): the one to avoid, the one to follow."""
    given = request.given
    size = (request.height, request.width)
    first = (*(given.original_size or size), *given.crop)
    rows: list[tuple[float, ...]]
    if family.time_ids == 5:
        rows = [(*first, given.negative_aesthetic_score), (*first, given.aesthetic_score)]
    else:
        rows = [(*first, *(given.target_size or size))] * 2
    return np.array(rows, np.float32)
