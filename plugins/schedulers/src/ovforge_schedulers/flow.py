"""Schedules of flows: how noise leaves from step to step, shifted by the size of the picture.

Sources: Liu et al., "Flow Straight and Fast" (2023), equation 1; Esser et al., "Scaling Rectified Flow Transformers"
(2024), section 5.3.2 (the shift); the dynamic shift is that of Black Forest Labs' FLUX, the stretch to a last level
that of Lightricks' LTX-Video. Numbers are those of diffusers' FlowMatch schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from ovforge.contracts import FlowRun, RandomStream
from ovforge.errors import ConfigError, InputError
from ovforge_sampling import ONE, Array, Options, Run, Scheduling, begun, refuse, takes_none
from ovforge_schedulers.spacing import SigmaOptions, check_one_spread, spread

__all__ = [
    "DynamicOptions",
    "FlowOptions",
    "FlowSampling",
    "FlowScheduling",
    "check_model",
    "dynamic_mu",
    "flow_schedule",
    "given",
    "partly",
    "refuse_levels",
    "shifted",
    "static_shift",
    "stretched",
]

STEEPEST = 80.0
"""The largest mu, either way: exp(mu) must have a float32."""
Flag = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
Config = TypeVar("Config", bound=Options)


class DynamicOptions(Options):
    """How the shift grows with the picture: in a line through (base_image_seq_len, base_shift) and the other end."""

    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = Field(256, ge=1)
    max_image_seq_len: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _two_points(self) -> Self:
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError("base_image_seq_len and max_image_seq_len must differ: a line goes through both")
        return self


class FlowOptions(DynamicOptions, SigmaOptions):
    """Options of diffusers' FlowMatch schedulers with shifts."""

    shift: float = Field(1.0, gt=0)
    use_dynamic_shifting: bool = False
    invert_sigmas: bool = False
    shift_terminal: float | None = Field(None, ge=0, lt=1)
    use_karras_sigmas: Flag = False
    use_exponential_sigmas: Flag = False
    use_beta_sigmas: Flag = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"


class FlowScheduling(Scheduling[Config]):
    """A method for networks that predict a flow's velocity."""

    def __init__(self, options: Config, model_config: Mapping[str, Any]) -> None:
        super().__init__(options, model_config)
        check_model(self.config, model_config)

    def start(self, steps: int, strength: float = 1.0) -> Run:
        """Begin a run of which only its length is known; see `start_flow`."""
        return self.start_flow(steps, FlowRun(), strength)

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> Run:
        """Begin a run. Raises InputError for what the schedule cannot have, or if `strength` leaves no step."""
        self.check_steps(steps)
        return partly(self.run_flow(steps, flow), steps, strength, self.order)

    def start_given(
        self, strength: float = 1.0, *, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> Run:
        """Begin a run over the timesteps or noise levels of a call, of which only that is known; see `start_flow`."""
        given = timesteps if sigmas is None else sigmas
        steps = 0 if given is None else len(given)
        return self.start_flow(steps, FlowRun(timesteps=timesteps, sigmas=sigmas), strength)

    def run_flow(self, steps: int, flow: FlowRun) -> Run:
        """Return a run from the first step on."""
        raise NotImplementedError


class FlowSampling:
    """A run in terms of sigmas, shape (steps + 1,) or more. The arrays that `step` returns belong to the caller."""

    init_noise_sigma = 1.0
    first = 0

    def __init__(self, timesteps: Array, sigmas: Array) -> None:
        self.timesteps: NDArray[Any] = timesteps
        self.sigmas = sigmas

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents: these methods scale nothing."""
        return latents

    def add_noise(self, original: Array, noise: Array, index: int) -> Array:
        """Return (1 - sigma) * original + sigma * noise."""
        return mixed(original, noise, self.sigmas[index])

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next level of noise."""
        raise NotImplementedError


def mixed(original: Array, noise: Array, sigma: np.float32) -> Array:
    """Return (1 - sigma) * original + sigma * noise, a new array."""
    result: Array = noise * sigma
    result += (ONE - sigma) * original
    return result


def partly(run: Run, steps: int, strength: float, order: int) -> Run:
    """Return the run, to begin where diffusers' pipelines of flows do: they round the steps left out, not the rest."""
    return begun(run, int(max(steps - min(steps * strength, steps), 0)) * order, steps, strength)


def check_model(config: Options, model_config: Mapping[str, Any]) -> None:
    """Raise ConfigError if the model's own scheduler says that its network predicts no flow."""
    predicts = model_config.get("prediction_type", "epsilon" if "beta_schedule" in model_config else None)
    if predicts in ("epsilon", "sample", "v_prediction") and not model_config.get("use_flow_sigmas"):
        raise ConfigError(
            f"the model predicts {predicts!r}, and {config.original} samples flows",
            where="scheduler.use",
            hint="Leave it out for the model's own, or choose one for diffusion, such as 'euler'.",
        )


def refuse_levels(config: Options, flow: FlowRun) -> None:
    """Raise InputError for levels of noise of a call, or of a model's pipeline, with a method that takes none."""
    for name in ("sigmas", "timesteps"):
        if getattr(flow, name) is not None:
            raise takes_none(config, name)


def flow_schedule(config: FlowOptions, steps: int, flow: FlowRun) -> tuple[Array, Array]:
    """Return timesteps, shape (steps,), and sigmas with the end, shape (steps + 1,), float32.

    Raises InputError for numbers that the schedule cannot have.
    """
    check_one_spread(config)
    train = config.num_train_timesteps
    times, levels = _single(given(flow.timesteps, steps, "timesteps")), _single(given(flow.sigmas, steps, "sigmas"))
    if levels is None:
        levels = (_even(config, steps) if times is None else times) / train
    mu = dynamic_mu(config, config, flow) if config.use_dynamic_shifting else None
    levels = static_shift(levels, config.shift) if mu is None else shifted(levels, mu, config.time_shift_type)
    if config.shift_terminal:
        levels = stretched(levels, config.shift_terminal)
    changed = spread(config, float(levels[0]), float(levels[-1]), steps)
    sigmas: Array = np.asarray(levels if changed is None else changed).astype(np.float32)
    if config.invert_sigmas:
        sigmas, times = ONE - sigmas, None
    if not np.isfinite(sigmas).all():
        raise InputError("the shifted sigmas are not numbers", where="scheduler", hint="Change the shift or the steps.")
    timesteps = sigmas * np.float32(train) if times is None else times
    return timesteps, np.append(sigmas, np.float32(config.invert_sigmas))


def _single(numbers: NDArray[np.float64] | None) -> Any:
    return None if numbers is None else numbers.astype(np.float32)


def _even(config: FlowOptions, steps: int) -> NDArray[np.float64]:
    """Return timesteps from the first to the last of training, each shifted, float64."""
    train = config.num_train_timesteps
    ends = np.array([train, 1], np.float32) / np.float32(train)
    if not config.use_dynamic_shifting:  # diffusers shifts the ends here, and all of them again below
        ends = static_shift(ends, config.shift)
    return np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps)


def given(numbers: Any, count: int, name: str) -> NDArray[np.float64] | None:
    """Return what a pipeline gives, float64. Raises InputError for another count, or numbers that cannot be."""
    if numbers is None:
        return None
    array = np.array(numbers, np.float64)
    if array.shape != (count,):
        raise InputError(f"{len(numbers)} {name}, and {count} are needed", where=name, hint="Give as many, or none.")
    wrong = [each for each in array if not (0 < each <= 1 if name == "sigmas" else each >= 0)]
    if wrong:
        hint = "Sigmas are above 0 and at most 1; timesteps are not negative."
        raise InputError(f"{wrong[0]:g} cannot be one of them", where=name, hint=hint)
    return array


def static_shift(levels: Any, shift: float) -> Any:
    """Return levels moved to more noise, in their dtype."""
    return shift * levels / (1 + (shift - 1) * levels)


def shifted(levels: Any, mu: float, kind: str) -> Any:
    """Return levels moved by exp(mu), or by mu itself ("linear"), in their dtype."""
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / levels - 1))


def stretched(levels: Any, last: float) -> Any:
    """Return levels stretched so that they end at `last`. Raises InputError if there is nothing to stretch."""
    rest = 1 - levels
    if rest[-1] == 0:
        raise InputError(
            "a schedule of one step has no last level that scheduler.shift_terminal could move",
            where="steps",
            hint="Give more steps, or set scheduler.shift_terminal = 0.",
        )
    return 1 - rest / (rest[-1] / (1 - last))


def dynamic_mu(config: Options, line: DynamicOptions, flow: FlowRun) -> float:
    """Return the shift of a run: as given, or from the picture's size.

    Raises ConfigError if neither is known, InputError for a shift that is too steep.
    """
    mu = flow.mu
    if mu is None:
        if flow.image_seq_len is None or line.base_shift is None or line.max_shift is None:
            what = "use_dynamic_shifting needs the size of the picture, base_shift and max_shift"
            raise refuse(config, "use_dynamic_shifting", what, "Set use_dynamic_shifting = false, and shift.")
        slope = (line.max_shift - line.base_shift) / (line.max_image_seq_len - line.base_image_seq_len)
        mu = flow.image_seq_len * slope + (line.base_shift - slope * line.base_image_seq_len)
    linear = getattr(config, "time_shift_type", "exponential") == "linear"
    if not abs(mu) <= STEEPEST or (linear and mu <= 0):
        raise InputError(
            f"{mu:g} is too steep a shift",
            where="scheduler.max_shift",
            hint="Give a smaller picture, or change scheduler.base_shift and scheduler.max_shift.",
        )
    return mu
