"""The pipeline's scheduler: what of its config the architecture changes, and where a run ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ovforge.contracts import FlowRun, FlowScheduler, GivenScheduler, Sampling, Scheduler, TaskContext
from ovforge.errors import InputError
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.request import Request

__all__ = ["Scheduling"]

SCHEDULER = "scheduler/scheduler_config.json"


class Scheduling:
    """Begins runs. With `raw`, the model's scheduler_config.json is taken as it stands."""

    def __init__(self, context: TaskContext, architecture: Architecture, *, raw: bool) -> None:
        self._context, self._architecture, self._raw = context, architecture, raw

    def start(self, request: Request, strength: float, size: tuple[int, ...]) -> tuple[Sampling, Request]:
        """Begin a run, or the part of one that `strength` says; `size` is (height, width) in latents.

        Return the call, too, with the number of steps that its own timesteps or sigmas make.
        """
        scheduler, given = self._scheduler(), request.given
        if given.timesteps is None and given.sigmas is None:
            return self._architecture.sampling(scheduler, request.steps, strength, size), request
        own = _Given(scheduler, given.timesteps, given.sigmas)
        sampling = self._architecture.sampling(own, request.steps, strength, size)
        steps = -(-len(sampling.timesteps) // own.order)
        if given.steps not in (None, steps):
            raise InputError(
                f"{given.steps}, and {own.name} make {steps} steps", where="steps", hint="Leave one of them out."
            )
        return sampling, replace(request, steps=steps)

    def steps(self, sampling: Sampling, first: int, end: float | None) -> range:
        """Return the indexes of the steps to take from `first` on: to the last, or to a part `end` of the schedule."""
        last = len(sampling.timesteps)
        if end is not None:
            cutoff = round(self._architecture.train_timesteps * (1 - end))
            last = first + int((np.asarray(sampling.timesteps[first:]) >= cutoff).sum())
        if first >= last:
            raise InputError("the run has no step left", where="denoising_end", hint="Take more steps, or end later.")
        return range(first, last)

    def first_below(self, sampling: Sampling, start: float, steps: int) -> int:
        """Return the first step below a part of the noise schedule, as diffusers' SDXL pipeline counts it."""
        cutoff = round(self._architecture.train_timesteps * (1 - start))
        left = int((np.asarray(sampling.timesteps) < cutoff).sum())
        if len(sampling.timesteps) == 2 * steps - 1 and left % 2 == 0:
            left += 1  # a method of second order calls the network twice a step; both belong together
        if not left:
            raise InputError("leaves no step", where="denoising_start", hint="Take more steps, or start earlier.")
        return len(sampling.timesteps) - left

    def notes(self) -> list[str]:
        """Return what a plan should say: what is changed of the scheduler's config, and whose name counts."""
        notes = []
        config = self._context.bundle.scheduler_config()
        named = config.get("_class_name")
        said = json.loads(self._context.bundle.assets.get(SCHEDULER, b"{}")).get("_class_name", named)
        if said != named:
            notes.append(f"model_index.json names {named}, which counts, and scheduler_config.json {said}")
        changed = ", ".join(f"{key} = {str(value).lower()}" for key, value in self._overrides(config, own=True).items())
        if changed:
            notes.append(f"scheduler_config.json is read with {changed}, {self._architecture.overriding}")
        return notes

    def _scheduler(self) -> Scheduler:
        def adjust(config: Mapping[str, Any], *, own: bool) -> Mapping[str, Any]:
            return {**config, **self._overrides(config, own=own)}

        return self._context.scheduler(adjust)

    def _overrides(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Return what of the model's scheduler config diffusers' pipeline for this task and model would change."""
        return {} if self._raw else self._architecture.overrides(config, own=own)


class _Given:
    """A scheduler whose runs go over a call's timesteps or sigmas, whatever the model's pipeline gives by itself."""

    def __init__(self, scheduler: Scheduler, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> None:
        self._scheduler, self._timesteps, self._sigmas = scheduler, timesteps, sigmas
        self.name = "sigmas" if timesteps is None else "timesteps"
        self.own_sigmas = False
        self.order: int = getattr(scheduler, "order", 1)
        self.spreads_steps = getattr(scheduler, "spreads_steps", False)

    def start(self, steps: int, strength: float = 1.0) -> Sampling:
        if not isinstance(self._scheduler, GivenScheduler):
            raise InputError("the scheduler takes none", where=self.name, hint="Leave them out, or choose another one.")
        return self._scheduler.start_given(strength, timesteps=self._timesteps, sigmas=self._sigmas)

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> Sampling:
        if not isinstance(self._scheduler, FlowScheduler):
            return self.start(steps, strength)
        own = replace(flow, timesteps=self._timesteps, sigmas=self._sigmas)
        return self._scheduler.start_flow(steps, own, strength)
