"""The course of a run, whatever the architecture: prompts -> conditions -> denoising -> pictures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import Progress, Sampling, TaskContext, ignore_progress
from ovforge.errors import InputError
from ovforge.model import BatchGenerator, ImagesResult, Result, Timings
from ovforge_diffusion.architectures import architecture_of
from ovforge_diffusion.architectures.base import PREVIEW, Architecture, Arrays, PromptEncoder, Task, Texts, tokenizer_of
from ovforge_diffusion.conditioning import ConditionPlan, Schedule, plan_conditions
from ovforge_diffusion.controls import conditions
from ovforge_diffusion.examples import edges, hole
from ovforge_diffusion.guidance import Guidance, SkipLayers, never_acts
from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
from ovforge_diffusion.models import Models
from ovforge_diffusion.network import not_finite
from ovforge_diffusion.prediction import Prediction
from ovforge_diffusion.request import Request, make_request
from ovforge_diffusion.scheduling import Scheduling
from ovforge_diffusion.shallow import shallow_role

__all__ = ["Diffusion", "Run", "Start"]

Array = NDArray[np.float32]

_log = logging.getLogger("ovforge.diffusion")


@dataclass
class Start:
    """Where a run begins: noised latents as the denoiser sees them, and the index of its first step.

    `extra` is what stands beside the latents; `renew(latents, index)` is called before each step, `blend` after it, and
    `finish` with each picture made. `still` has 1 for tokens that are given, (tokens,), and less for those that are so
    in part. The first `before` tokens go with the latents, and are left out at last. `held` are inputs of the denoiser
    that all rows share, and `notes` are warnings.
    """

    latents: Array
    first: int = 0
    extra: Array | None = None
    renew: Callable[[Array, int], Array] | None = None
    blend: Callable[[Array, int], Array] | None = None
    finish: Callable[[Image.Image], Image.Image] = lambda image: image
    still: Array | None = None
    before: int = 0
    held: Arrays = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """A call that is to be carried out: its schedule, and what its prompts became.

    `learned` says for the provenance which learned words they used, and `notes` are warnings.
    """

    request: Request
    sampling: Sampling
    conditions: Schedule
    learned: dict[str, list[str]]
    notes: list[str]


class Diffusion:
    """A task that makes pictures; calls are served one at a time. Subclasses say where a run begins."""

    name: ClassVar[Task]

    encodes: ClassVar[bool] = False
    """Whether the task takes a picture."""

    def __init__(self, options: DiffusionOptions, context: TaskContext) -> None:
        self._options, self._adapters = options, context.adapters
        self.architecture = architecture_of(context, self.name)
        self.scheduling = Scheduling(context, self.architecture, raw=options.raw_scheduler)
        self._models = Models(context.bundle, self.architecture, options, context.inputs, encodes=self.encodes)
        self.autoencoder = self._models.autoencoder
        self._prompts: PromptEncoder | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Any, progress: Callable[[Progress], None] = ignore_progress) -> Any:
        """Make pictures, an ImagesResult, or what else a task makes.

        Raises InputError for what the model cannot do, ModelError where it computes no numbers. What the progress
        callback raises ends the run.
        """
        with self._lock:
            request, adapters = self._requested(inputs)
            try:
                return self._with_adapters(inputs, request, adapters, progress)
            except BaseException:
                self._release_prompts()
                self._models.release_all()  # or the next run would hold its text encoders beside the denoiser
                raise

    # -- what subclasses say --------------------------------------------------------------------------------------

    def _begin(self, inputs: Any, request: Request, sampling: Sampling, rng: BatchGenerator, timings: Timings) -> Start:
        """Return what the run starts from; each task has its own way."""
        raise NotImplementedError

    def _size_of(self, inputs: Any) -> tuple[int, int] | None:
        """Return (width, height) of the picture that a run starts from; None if there is none."""
        return None

    def _references(self, inputs: Any) -> tuple[tuple[int, int], ...]:
        """Return (width, height) of each picture that the denoiser is to see beside the latents."""
        return ()

    def _strength(self, request: Request) -> float:
        """Return the part of the schedule that a run goes."""
        return 1.0

    def _as_inputs(self, inputs: Any, request: Request) -> dict[str, Any]:
        """Return inputs that make the same again."""
        return request.as_inputs()

    # -- the course of a run --------------------------------------------------------------------------------------

    def _requested(self, inputs: Any) -> tuple[Request, dict[str, float]]:
        """Return the call with every default filled in, and the adapters that its prompts name."""
        references = self._references(inputs)
        size = self.architecture.size_beside(references) if references else self._size_of(inputs)
        request = make_request(inputs, self.architecture, size, references)
        if self._options.prompts == "weighted":
            return request.without_adapters()
        return request, {}

    def _with_adapters(
        self, inputs: Any, request: Request, adapters: dict[str, float], progress: Callable[[Progress], None]
    ) -> Any:
        """Make a call with the adapters that its prompts name switched on."""
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

    def _made(self, inputs: Any, request: Request, progress: Callable[[Progress], None]) -> Any:
        timings = Timings()
        [run] = self._read([request], timings, progress)
        return self._carried_out(inputs, run, timings, progress)

    def _read(self, requests: Sequence[Request], timings: Timings, progress: Callable[[Progress], None]) -> list[Run]:
        """Return the runs of one call, which read prompts alike: each text is encoded once for all of them."""
        roles = self.architecture.encoders
        begun = [self.scheduling.start(each, self._strength(each), self._size(each)) for each in requests]
        weighted = self._options.prompts == "weighted"
        plans = [plan_conditions(each, len(sampling.timesteps), weighted=weighted) for sampling, each in begun]
        progress(Progress("text encoding", 0, begun[0][1].steps))
        schedules, lost = self._encode(plans, begun[0][1], timings)
        runs = []
        for (sampling, request), plan, schedule in zip(begun, plans, schedules, strict=True):
            learned, unused = self._learned(request)
            runs.append(Run(request, sampling, schedule, learned, [*lost, *plan.warnings, *unused]))
        self._release_prompts(*map(tokenizer_of, roles), *roles, *self.architecture.image_encoders)
        return runs

    def _carried_out(self, inputs: Any, run: Run, timings: Timings, progress: Callable[[Progress], None]) -> Any:
        """Return what a run makes."""
        models, request, sampling = self._models, run.request, run.sampling
        rng = BatchGenerator(request.seeds)
        seen = self._seen_by_controlnets(request, rng, timings)
        start = self._begin(inputs, request, sampling, rng, timings)
        models.release("vae_encoder")
        try:
            latents = self._denoise(request, sampling, run.conditions, start, seen, rng, timings, progress)
        except InputError:
            models.forget_denoiser()  # its requests hold what a call that failed has set
            raise
        denoiser = self.architecture.denoiser
        models.release(denoiser, shallow_role(denoiser), *self.architecture.controlnets)
        result = self._result(
            self.architecture.unpack(latents, *self._size(request)), request, start, rng, timings, progress
        )
        models.release("vae_decoder", PREVIEW)
        result.timings = timings
        result.provenance = {"inputs": self._as_inputs(inputs, request), **run.learned}
        given, calls = request.given, len(self.scheduling.steps(sampling, start.first, request.given.denoising_end))
        end = self.architecture.guidance_end(given.guidance_stop, calls)
        idle = never_acts(given.guidance_start, given.guidance_stop, end, calls)
        result.warnings += [*request.remarks, *idle, *start.notes, *run.notes, *self.architecture.notes()]
        return result

    def _result(
        self,
        latents: Array,
        request: Request,
        start: Start,
        rng: BatchGenerator,
        timings: Timings,
        progress: Callable[[Progress], None],
    ) -> Result:
        """Return what clean latents, (pictures, channels, height, width), are decoded to."""
        images = []
        if request.decode:
            progress(Progress("decoding", 0, len(latents)))
            for number, row in enumerate(latents):
                with timings.span("vae_decoder"):
                    images.append(start.finish(self.autoencoder.decode(row, request.asked)))
                progress(Progress("decoding", number + 1, len(latents)))
        return ImagesResult(images=images, seeds=request.seeds, latents=latents)

    def _encode(
        self, plans: Sequence[ConditionPlan], request: Request, timings: Timings
    ) -> tuple[list[Schedule], list[str]]:
        """Return the conditions of each step of each plan, and warnings of what did not fit."""
        if self._prompts is None:
            self._prompts = self.architecture.prompt_encoder(self._models.encoder, self._options)
        rows: dict[tuple[Texts, bool], int] = {}
        picked = [
            [rows.setdefault(text, len(rows)) for text in zip(plan.texts, plan.negative, strict=True)] for plan in plans
        ]
        texts, negative = zip(*rows, strict=True)
        inputs, lost = self._prompts.encode(texts, request, timings, negative)
        for name, value in inputs.items():
            self._say(name, value)
        own = ({name: value[numbers] for name, value in inputs.items()} for numbers in picked)
        return [plan.schedule(each) for plan, each in zip(plans, own, strict=True)], lost

    def _denoise(
        self,
        request: Request,
        sampling: Sampling,
        schedule: Schedule,
        start: Start,
        seen: Sequence[Arrays],
        rng: BatchGenerator,
        timings: Timings,
        progress: Callable[[Progress], None],
    ) -> Array:
        """Return clean latents, float32, packed as the denoiser has them."""
        steps = self.scheduling.steps(sampling, start.first, request.given.denoising_end)
        # Compilation is not part of denoising.
        prediction = self._prediction(request, sampling, schedule, start, steps, seen)
        latents = start.latents
        with timings.span("denoise"):
            for number, index in enumerate(steps):
                before = time.perf_counter()
                if start.renew is not None:
                    latents = start.renew(latents, index)
                scaled = sampling.scale_input(latents, index)
                output = prediction.at(number, len(steps), sampling.timesteps[index], scaled, timings)
                with timings.span("denoise.scheduler"):
                    latents = sampling.step(output, index, latents, rng)
                    if start.blend is not None:
                        latents = start.blend(latents, index)
                self._check(output, latents, number, len(steps))
                if _log.isEnabledFor(logging.DEBUG):
                    self._say(f"step {number + 1}/{len(steps)} t={sampling.timesteps[index]:g} prediction", output)
                    self._say(f"step {number + 1}/{len(steps)} latents", latents, time.perf_counter() - before)
                preview = partial(self._preview, request, sampling, latents[:, start.before :], index)
                progress(Progress("denoising", number + 1, len(steps), preview=preview))
        return latents[:, start.before :]

    def _seen_by_controlnets(self, request: Request, rng: BatchGenerator, timings: Timings) -> Sequence[Arrays]:
        """Return the inputs of each condition's ControlNet."""
        if not self.architecture.encodes_conditions:
            return conditions(request, self.architecture, self.autoencoder, rng)
        self._models.require_encoder()
        with timings.span("vae_encoder"):
            return conditions(request, self.architecture, self.autoencoder, rng)

    def _prediction(
        self,
        request: Request,
        sampling: Sampling,
        schedule: Schedule,
        start: Start,
        steps: range,
        seen: Sequence[Arrays],
    ) -> Prediction:
        """Return what predicts at each step, with all that holds for this run set."""
        given = request.given
        skip = SkipLayers(
            given.skip_layer_guidance_scale,
            given.skip_layer_guidance_start,
            given.skip_layer_guidance_stop,
            request.steps,
        )
        guidance = Guidance(
            schedule.halves,
            request.guidance or 1.0,
            schedule.weights,
            given.guidance_rescale,
            skip if request.skipped_layers else None,
            given.guidance_start,
            self._guided_until(given, sampling.timesteps[steps.start : steps.stop]),
            self.architecture.keeps_norm and given.cfg_normalization != 0,
            0.0 if self.architecture.keeps_norm else given.cfg_normalization or 0.0,
        )
        if guidance.is_partial and schedule.halves > 2:
            raise InputError(
                "guidance in a part of the steps goes with one prompt, without AND and skip_guidance_layers",
                where="guidance_start, guidance_stop, cfg_truncation",
                hint="Leave one of them out.",
            )
        split = guidance.varies or self._options.guidance == "split"
        what = len(request.prompts), self._size(request), schedule.halves
        factor = self.architecture.factor
        beside = [(height // factor, width // factor) for width, height in request.references]
        denoiser = self._models.denoiser(
            *what,
            split=split,
            beside=beside,
            length=given.max_sequence_length,
            before=start.before,
            timed=start.still is not None,
        )
        controlnets = partial(self._models.controlnets, *what, split=split)
        extra = start.extra
        if self.architecture.stacks_condition:
            [condition], seen = seen, ()
            extra = condition["controlnet_cond"]
        prediction = Prediction(denoiser, self.architecture, request, schedule, guidance, controlnets, seen)
        for name, value in start.held.items():
            denoiser.hold(name, value)
        denoiser.check(sampling.timesteps)
        if extra is not None:
            denoiser.extend(extra)
        if start.still is not None:
            denoiser.keep_still(start.still)
        return prediction

    def _guided_until(self, given: DiffusionInputs, timesteps: NDArray[Any]) -> int | None:
        """Return the step at which guidance ends; None if it acts to the last.

        It ends after a part of the steps, or as soon as a picture has more than a share of itself.
        """
        ends = [self.architecture.guidance_end(given.guidance_stop, len(timesteps))] if given.guidance_stop < 1 else []
        if (share := given.cfg_truncation) is not None:
            ends += [step for step, time in enumerate(timesteps) if self.architecture.timestep(time) > share][:1]
        return min(ends, default=None)

    def _check(self, output: Array, latents: Array, number: int, steps: int) -> None:
        """Raise ModelError for what is not a number."""
        if not np.isfinite(latents).all():
            raise not_finite(
                self.architecture.denoiser if not np.isfinite(output).all() else "scheduler",
                f"step {number + 1} of {steps} gave numbers that are not finite",
            )

    def _preview(self, request: Request, sampling: Sampling, latents: Array, index: int) -> list[Image.Image]:
        """Return pictures of latents after step `index`, scaled to what they will be at the end."""
        rows = self._foreseen(request, sampling, latents, index)
        return [self.autoencoder.preview(row, request.asked) for row in rows]

    def _foreseen(self, request: Request, sampling: Sampling, latents: Array, index: int) -> Array:
        """Return latents after step `index`, unpacked, scaled to what they will be at the end."""
        last = index + 1 >= len(sampling.timesteps)
        seen = latents if last else sampling.scale_input(latents, index + 1)
        return self.architecture.unpack(seen, *self._size(request))

    # -- small parts ----------------------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Return what a plan should say: what the architecture does, and what is changed of the scheduler's config."""
        return [*self.architecture.notes(), *self.scheduling.notes()]

    def latents_shape(self, request: Request) -> tuple[int, ...]:
        """Return (pictures, channels, height, width) of the latents."""
        return (len(request.prompts), self.architecture.latent_channels, *self._size(request))

    def _size(self, request: Request) -> tuple[int, ...]:
        """Return (height, width) in latents, of videos (frames, height, width)."""
        return request.height // self.architecture.factor, request.width // self.architecture.factor

    def _conditions(self, number: int) -> dict[str, Any]:
        """Return what example `number` needs for the pipeline's ControlNets."""
        architecture = self.architecture
        size, nets = architecture.size, architecture.conditioned(1)
        return {"control": [_example(architecture, role, number, size) for role in nets]} if nets else {}

    def _learned(self, request: Request) -> tuple[dict[str, list[str]], list[str]]:
        """Return the learned words that prompts used, for the provenance, and warnings of pictures that use none."""
        words = dict.fromkeys(word for taught in self._models.learned.values() for word in taught)
        if not words or self._prompts is None:
            return {}, []
        negatives = request.negatives or request.prompts
        pairs = list(dict.fromkeys(zip(request.prompts, negatives, strict=True)))
        used = self._prompts.learned([prompt for pair in pairs for prompt in pair])
        unused = [
            f"the prompt {pair[0][0]!r} uses none of the learned words: {', '.join(words)}"
            for pair, mine, other in zip(pairs, used[::2], used[1::2], strict=True)
            if not mine and not other
        ]
        return {"learned_tokens": list(dict.fromkeys(word for each in used for word in each))}, unused

    def _release_prompts(self, *roles: str) -> None:
        if self._options.low_memory:
            self._prompts = None
            self._models.release(*roles)

    def _say(self, what: str, array: NDArray[Any], seconds: float | None = None) -> None:
        """Write shape, statistics and time to the debug log."""
        if _log.isEnabledFor(logging.DEBUG):
            took = "" if seconds is None else f" in {seconds:.4f} s"
            _log.debug(
                "%s: %s %s min %.5g mean %.5g max %.5g std %.5g%s",
                what, list(array.shape), array.dtype, array.min(), array.mean(), array.max(), array.std(), took,
            )  # fmt: skip


def _example(architecture: Architecture, role: str, number: int, size: int) -> dict[str, Any]:
    """Return a condition for a ControlNet: of each of its kinds in turn."""
    modes = architecture.modes(role)
    mode = {} if modes is None else {"mode": number % modes}
    mask = {"mask": hole(number, size)} if architecture.paints(role) else {}
    return {"image": edges(number, size), **mode, **mask}
