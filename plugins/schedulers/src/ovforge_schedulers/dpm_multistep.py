"""Multistep DPM-Solver in numpy: DPM++ 2M, 3M and their forms with noise.

Source of the method: Lu et al., "DPM-Solver++" (2022), algorithm 2; the numbers are those of
`diffusers.DPMSolverMultistepScheduler`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ovforge.contracts import FlowRun, RandomStream
from ovforge_sampling import Array, log, refuse, whole
from ovforge_schedulers.dpm import DPMOptions, DPMSampling, Weights, check_dpm, usable_timesteps
from ovforge_schedulers.solvers import SolverScheduler, SpacedSolverOptions, noise_levels, scheduled
from ovforge_schedulers.spacing import Doubles, check_not_spread, sigma_table, spaced_before_end

__all__ = ["DPMMultistepOptions", "DPMMultistepSampling", "DPMMultistepScheduler", "dpm_multistep_sde"]

FEW = 15
"""Below this many steps diffusers lowers the order of the last two, for stability."""


class DPMMultistepOptions(SpacedSolverOptions, DPMOptions):
    """Options of diffusers' DPMSolverMultistepScheduler."""

    original: ClassVar[str] = "DPMSolverMultistepScheduler"

    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    rescale_betas_zero_snr: bool = False


class DPMMultistepScheduler(SolverScheduler[DPMMultistepOptions]):
    """A polynomial through the last predictions, one call of the network a step."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_dpm(self.config)
        if self.config.algorithm_type == "sde-dpmsolver" and self.config.solver_order > 2:
            raise refuse(
                self.config,
                "solver_order",
                f"'sde-dpmsolver' has no order {self.config.solver_order}",
                "Set solver_order = 2, or algorithm_type = 'sde-dpmsolver++'.",
            )

    def run(self, steps: int, flow: FlowRun | None = None) -> DPMMultistepSampling:
        """Return a run from the first step on. Raises InputError for levels of a pipeline's own."""
        self.without_levels(flow)
        config = self.config
        last = usable_timesteps(config, self.alphas_cumprod, lambdas(self.alphas_cumprod))
        times = spaced_before_end(config.timestep_spacing, last, config.num_train_timesteps, steps, config.steps_offset)
        return self._over(times, steps, self.mu(flow))

    def run_timesteps(self, timesteps: Doubles) -> DPMMultistepSampling:
        """Return a run over timesteps of a call."""
        check_not_spread(self.config)
        return self._over(whole(timesteps, self.config).astype(np.float64), len(timesteps))

    def _over(self, times: Doubles, steps: int, mu: float | None = None) -> DPMMultistepSampling:
        config, alphas = self.config, self.alphas_cumprod
        spaced, levels = noise_levels(
            config, alphas, times, steps, whole=config.beta_schedule != "squaredcos_cap_v2", mu=mu
        )
        end = sigma_table(alphas)[0] if config.final_sigmas_type == "sigma_min" else 0
        run = DPMMultistepSampling(*scheduled(config, spaced, levels, end), config)
        order = min(run.order(steps - 1), steps)
        if run.lambdas[-1] == run.lambdas[-2] and order > (1 if config.solver_type == "heun" else 2):
            what = "'sigma_min' is where the last step begins, and it divides by its own length"
            raise refuse(config, "final_sigmas_type", what, "Set final_sigmas_type = 'zero', or euler_at_final = true.")
        return run


class DPMMultistepSampling(DPMSampling):
    """One run of the multistep DPM-Solver."""

    config: DPMMultistepOptions

    def __init__(self, *schedule: Any) -> None:
        super().__init__(*schedule)
        self._history: list[Array] = []

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level. Raises ValueError out of order."""
        self.turns.take(index)
        self._history = [*self._history[-2:], self.predicted(output, latents, index)]
        weights = Weights(self, index, index + 1)
        noise = self.drawn(self._history[-1], rng)
        order = min(self.order(index), len(self._history))
        return self.moved(latents, weights, self._terms(weights, index, order), noise)

    def order(self, index: int) -> int:
        """Return the order of step `index`, with enough of a history."""
        config, left = self.config, len(self.timesteps) - index
        few = config.lower_order_final and len(self.timesteps) < FEW
        if left == 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        return min(config.solver_order, 2 if left == 2 and few else 3)

    def _terms(self, weights: Weights, index: int, order: int) -> list[tuple[np.float32, Array]]:
        newest = self._history[-1]
        if order == 1:
            return [(weights.first, newest)]
        near = (self.lambdas[index] - self.lambdas[index - 1]) / weights.h
        slope = (newest - self._history[-2]) / near
        if order == 2:
            midpoint = self.config.solver_type == "midpoint"
            return [(weights.first, newest), (weights.half if midpoint else weights.second, slope)]
        far = (self.lambdas[index - 1] - self.lambdas[index - 2]) / weights.h
        bend = slope - (self._history[-2] - self._history[-3]) / far
        slope += bend * (near / (near + far))
        bend /= near + far
        return [(weights.first, newest), (weights.second, slope), (weights.third, bend)]


def dpm_multistep_sde(options: DPMMultistepOptions, model_config: Mapping[str, Any]) -> DPMMultistepScheduler:
    """Return the form with noise, whatever the model's own config says of the algorithm."""
    if "algorithm_type" not in options.model_fields_set:
        options = type(options).model_validate(
            {**options.model_dump(exclude_unset=True), "algorithm_type": "sde-dpmsolver++"}
        )
    return DPMMultistepScheduler(options, model_config)


def lambdas(alphas: Array) -> Array:
    """Return half the log signal-to-noise ratio of each timestep of training."""
    result: Array = log(np.sqrt(alphas)) - log(np.sqrt(np.float32(1) - alphas))
    return result
