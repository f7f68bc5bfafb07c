"""Euler's and Heun's methods and consistency sampling for flows, in numpy.

Sources of the methods: Liu et al., "Flow Straight and Fast" (2023), equation 1; Karras et al. 2022, algorithm 1 (Heun);
Luo et al., "Latent Consistency Models" (2023), algorithm 3, with a flow's levels. The numbers are those of diffusers'
FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler and FlowMatchLCMScheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ovforge.contracts import FlowRun, RandomStream
from ovforge_sampling import Array, Options, refuse
from ovforge_schedulers.flow import (
    FlowOptions,
    FlowSampling,
    FlowScheduling,
    flow_schedule,
    mixed,
    refuse_levels,
    static_shift,
)
from ovforge_schedulers.runs import Turns
from ovforge_schedulers.spacing import check_one_spread

__all__ = [
    "FlowEulerOptions",
    "FlowEulerSampling",
    "FlowEulerScheduler",
    "FlowHeunOptions",
    "FlowHeunSampling",
    "FlowHeunScheduler",
    "FlowLCMOptions",
    "FlowLCMSampling",
    "FlowLCMScheduler",
]


class FlowEulerOptions(FlowOptions):
    """Options of diffusers' FlowMatchEulerDiscreteScheduler."""

    original: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    stochastic_sampling: bool = False


class FlowEulerScheduler(FlowScheduling[FlowEulerOptions]):
    """Straight lines along the predicted velocity, from one level of noise to the next."""

    def __init__(self, options: FlowEulerOptions, model_config: Mapping[str, Any]) -> None:
        super().__init__(options, model_config)
        check_one_spread(self.config)

    def run_flow(self, steps: int, flow: FlowRun) -> FlowSampling:
        """Return a run from the first step on."""
        kind = FlowLCMSampling if self.config.stochastic_sampling else FlowEulerSampling
        return kind(*flow_schedule(self.config, steps, flow))


class FlowEulerSampling(FlowSampling):
    """One run of Euler's method."""

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next level of noise."""
        moved: Array = output * (self.sigmas[index + 1] - self.sigmas[index])
        moved += latents
        return moved


class FlowLCMOptions(FlowOptions):
    """Options of diffusers' FlowMatchLCMScheduler."""

    original: ClassVar[str] = "FlowMatchLCMScheduler"

    scale_factors: tuple[float, ...] | None = Field(None, description="not here: latents that grow from step to step")
    upscale_mode: Literal["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"] = "bicubic"


class FlowLCMScheduler(FlowScheduling[FlowLCMOptions]):
    """Jumps to the picture, and back to the next level with new noise."""

    def __init__(self, options: FlowLCMOptions, model_config: Mapping[str, Any]) -> None:
        super().__init__(options, model_config)
        check_one_spread(self.config)
        if self.config.scale_factors:
            what = "latents that grow from step to step are not known here"
            raise refuse(self.config, "scale_factors", what, "Leave it out: all steps are made at the picture's size.")

    def run_flow(self, steps: int, flow: FlowRun) -> FlowLCMSampling:
        """Return a run from the first step on."""
        return FlowLCMSampling(*flow_schedule(self.config, steps, flow))


class FlowLCMSampling(FlowSampling):
    """One run of consistency sampling, and of Euler's method with `stochastic_sampling`."""

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Jump to the picture, and back to the noise of the next level; the last step stays there."""
        clean: Array = output * -self.sigmas[index]
        clean += latents
        following = self.sigmas[index + 1]
        return mixed(clean, rng.randn(output.shape), following) if following else clean


class FlowHeunOptions(Options):
    """Options of diffusers' FlowMatchHeunDiscreteScheduler."""

    original: ClassVar[str] = "FlowMatchHeunDiscreteScheduler"

    shift: float = Field(1.0, gt=0)


class FlowHeunScheduler(FlowScheduling[FlowHeunOptions]):
    """Heun's method: two calls of the network a step, one for the last."""

    order = 2

    def __init__(self, options: FlowHeunOptions, model_config: Mapping[str, Any]) -> None:
        super().__init__(options, model_config)
        if model_config.get("use_dynamic_shifting"):
            raise refuse(
                self.config,
                "use",
                f"the model shifts its schedule by the picture's size, and {self.config.original} cannot",
                "Choose 'flow-euler'.",
            )

    def run_flow(self, steps: int, flow: FlowRun) -> FlowHeunSampling:
        """Return a run from the first step on. Raises InputError for levels of a call, or of a pipeline's own."""
        refuse_levels(self.config, flow)
        train, shift = self.config.num_train_timesteps, self.config.shift
        high, low = static_shift(np.array([train, 1], np.float32) / np.float32(train), shift)
        even = np.linspace(float(high) * train, float(low) * train, steps) / train
        levels: Array = static_shift(even, shift).astype(np.float32)
        times = levels * np.float32(train)
        twice = np.concatenate([levels[:1], levels[1:].repeat(2), np.zeros(1, np.float32)])
        return FlowHeunSampling(np.concatenate([times[:1], times[1:].repeat(2)]), twice)


class FlowHeunSampling(FlowSampling):
    """One run of Heun's method."""

    def __init__(self, timesteps: Array, sigmas: Array) -> None:
        super().__init__(timesteps, sigmas)
        self._turns = Turns()
        self._slope: Array | None = None
        self._start: Array | None = None

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next level: tried, or, every second time, corrected."""
        trying = self._turns.take(index) % 2 == 0
        sigma = self.sigmas[index]
        # By way of the picture, as diffusers does: what is rounded off there is part of its numbers.
        slope: Array = latents - output * sigma
        np.subtract(latents, slope, out=slope)
        slope /= sigma
        if trying:
            self._slope, self._start = slope, latents.copy()
            moved: Array = slope * (self.sigmas[index + 1] - sigma)
            moved += latents
            return moved
        assert self._slope is not None
        assert self._start is not None
        slope += self._slope
        slope *= np.float32(0.5)
        slope *= sigma - self.sigmas[index - 1]
        slope += self._start
        return slope
