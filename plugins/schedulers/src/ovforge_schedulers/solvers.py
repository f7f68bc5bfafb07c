"""Options and schedules that DPM-Solver, UniPC and DEIS share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from ovforge.config import checked
from ovforge.contracts import FlowRun
from ovforge.errors import InputError
from ovforge_sampling import (
    CONFIG_FILE,
    Array,
    BetaSchedule,
    NoiseOptions,
    NoiseScheduler,
    Run,
    Spacing,
    SpacingOptions,
    ThresholdOptions,
    refuse,
)
from ovforge_schedulers.flow import DynamicOptions, dynamic_mu, partly, refuse_levels, static_shift
from ovforge_schedulers.spacing import (
    Doubles,
    SigmaOptions,
    check_one_spread,
    in_range,
    interpolated,
    sigma_table,
    spread,
    spread_evenly,
    times_of,
)

__all__ = [
    "SolverOptions",
    "SolverScheduler",
    "SpacedSolverOptions",
    "check_spreads",
    "instead_of",
    "noise_levels",
    "scheduled",
]

Times = NDArray[np.int64]
Wide = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
"""What networks of the solvers predict: noise, the picture, Salimans and Ho's v, or a flow's velocity."""


def instead_of(theirs: Mapping[str, str]) -> BeforeValidator:
    """Return a validator that takes what other solvers' configs say for what diffusers takes in its place."""
    return BeforeValidator(lambda value: theirs.get(value, value) if isinstance(value, str) else value)


class SolverOptions(NoiseOptions, ThresholdOptions, SigmaOptions):
    """Options of all solvers."""

    beta_schedule: BetaSchedule = "linear"
    solver_order: int = Field(2, ge=1, le=9)
    prediction_type: Wide = "epsilon"
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = Field(1.0, gt=0)
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"


class SpacedSolverOptions(SolverOptions, SpacingOptions):
    """Options of the solvers whose timesteps can be spaced in more than one way."""

    timestep_spacing: Spacing = "linspace"


Solving = TypeVar("Solving", bound=SolverOptions)


class SolverScheduler(NoiseScheduler[Solving]):
    """A method for networks of diffusion, and of flows if the options say so."""

    needs_mu: ClassVar[bool] = False
    """Whether diffusers' class refuses use_dynamic_shifting if a run brings no shift; others take flow_shift."""

    shifts_in_lines: ClassVar[bool] = False
    """Whether diffusers' class knows the linear time shift."""

    def __init__(self, options: Solving, model_config: Mapping[str, Any]) -> None:
        super().__init__(options, model_config)
        self.own_sigmas = self.config.use_flow_sigmas
        known = {key: model_config[key] for key in DynamicOptions.model_fields if key in model_config}
        # diffusers' pipelines read the shift's line from the model's config, whatever options the class has.
        self._line = checked(DynamicOptions, known, where=CONFIG_FILE)

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> Run:
        """Begin a run on a flow. Raises ConfigError if the options are for diffusion."""
        if not self.config.use_flow_sigmas or self.config.prediction_type != "flow_prediction":
            raise refuse(
                self.config,
                "use_flow_sigmas",
                "the model is a flow, and the options are for diffusion",
                "Set use_flow_sigmas = true, prediction_type = 'flow_prediction', and flow_shift to the model's shift.",
            )
        self.check_steps(steps)
        return partly(self.run(steps, flow), steps, strength, self.order)

    def run(self, steps: int, flow: FlowRun | None = None) -> Run:
        """Return a run from the first step on."""
        raise NotImplementedError

    def mu(self, flow: FlowRun | None) -> float | None:
        """Return the shift of this run, if it has one of its own. Raises ConfigError if it should and cannot."""
        config = self.config
        if not config.use_dynamic_shifting or not config.use_flow_sigmas:
            return None
        known = flow is not None and (flow.mu is not None or flow.image_seq_len is not None)
        if not known and not self.needs_mu:
            return None
        if config.time_shift_type == "linear" and not self.shifts_in_lines:
            what = f"{config.original} shifts by 'exponential' only"
            raise refuse(config, "time_shift_type", what, "Set time_shift_type = 'exponential'.")
        return dynamic_mu(config, self._line, flow or FlowRun())

    def without_levels(self, flow: FlowRun | None) -> None:
        """Raise InputError for levels of noise of a call, or of a model's pipeline: this method takes none."""
        refuse_levels(self.config, flow or FlowRun())


def check_spreads(config: SolverOptions, *, with_flow: tuple[str, ...] = ()) -> None:
    """Raise ConfigError if noise levels are to be spread in two ways, or a flow's in one that is not for flows."""
    check_one_spread(config)
    spreads = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    for name in set(spreads) - set(with_flow) if config.use_flow_sigmas else ():
        if getattr(config, name, False):
            what = f"{name} spreads noise levels above 1, and a flow's end there"
            raise refuse(config, "use_flow_sigmas", what, f"Set one of use_flow_sigmas and {name}.")


def noise_levels(
    config: SolverOptions, alphas: Array, times: Doubles, steps: int, *, whole: bool = True, mu: float | None = None
) -> tuple[NDArray[Any], Doubles]:
    """Return timesteps and noise levels without the last, spread as the config says.

    `whole` rounds Karras's times; `mu` is the shift of a flow's run, in place of `flow_shift`.
    """
    table = sigma_table(alphas)
    if getattr(config, "use_lu_lambdas", False) and not config.use_karras_sigmas:
        levels: Doubles | None = spread_evenly(np.log(table), steps)
    else:
        whole = whole and config.use_karras_sigmas
        levels = spread(config, float(table[-1]), float(table[0]), steps)
    if levels is not None:
        spaced = times_of(levels, alphas)
        return spaced.round() if whole else spaced, levels
    if config.use_flow_sigmas:
        # Of equal steps in the share of noise (Liu et al. 2023), shifted to more noise (Esser et al. 2024).
        shares = 1 - np.linspace(1, 1 / config.num_train_timesteps, steps + 1)
        shifted = static_shift(shares, config.flow_shift if mu is None else np.exp(mu))
        return shifted[:0:-1] * config.num_train_timesteps, shifted[:0:-1].copy()
    return times, interpolated(alphas, times)


def scheduled(config: SolverOptions, times: NDArray[Any], levels: Doubles, last: Any) -> tuple[Times, Array]:
    """Return timesteps and noise levels in the types of a run. Raises InputError if two levels are the same."""
    timesteps, sigmas = times.astype(np.int64), np.append(levels, last).astype(np.float32)
    in_range(timesteps, config.num_train_timesteps, len(timesteps))
    if np.any(np.diff(sigmas[:-1]) >= 0):
        raise InputError(
            f"{len(timesteps)} steps are too many for this schedule: two have the same noise level, and a solver"
            " divides by the difference",
            where="steps",
            hint="Give fewer steps, or change scheduler.timestep_spacing.",
        )
    return timesteps, sigmas
