"""Singlestep DPM-Solver in numpy: DPM++ 2S, 3S and their forms with noise.

Source of the method: Lu et al., "DPM-Solver++" (2022), algorithm 1; the numbers are those of
`diffusers.DPMSolverSinglestepScheduler`, which takes the calls of one step for steps of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ovforge.contracts import FlowRun, RandomStream
from ovforge_sampling import Array, refuse, whole
from ovforge_schedulers.dpm import DPMOptions, DPMSampling, Weights, check_dpm, usable_timesteps
from ovforge_schedulers.dpm_multistep import lambdas
from ovforge_schedulers.solvers import SolverScheduler, instead_of, noise_levels, scheduled
from ovforge_schedulers.spacing import Doubles, check_not_spread, sigma_table, spaced_before_end

__all__ = ["DPMSinglestepOptions", "DPMSinglestepSampling", "DPMSinglestepScheduler"]


class DPMSinglestepOptions(DPMOptions):
    """Options of diffusers' DPMSolverSinglestepScheduler."""

    original: ClassVar[str] = "DPMSolverSinglestepScheduler"

    algorithm_type: Annotated[
        Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver++"], instead_of({"deis": "dpmsolver++"})
    ] = "dpmsolver++"
    solver_order: int = Field(2, ge=1, le=3)
    lower_order_final: bool = False


class DPMSinglestepScheduler(SolverScheduler[DPMSinglestepOptions]):
    """Each group of up to three calls of the network makes one step from the group's beginning."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_dpm(self.config)
        if self.config.algorithm_type == "dpmsolver" and self.config.thresholding:
            what = "algorithm_type 'dpmsolver' predicts noise, which has no range to threshold"
            raise refuse(self.config, "thresholding", what, "Set algorithm_type = 'dpmsolver++'.")

    def run(self, steps: int, flow: FlowRun | None = None) -> DPMSinglestepSampling:
        """Return a run from the first step on. Raises InputError for levels of a pipeline's own."""
        self.without_levels(flow)
        last = usable_timesteps(self.config, self.alphas_cumprod, lambdas(self.alphas_cumprod))
        times = spaced_before_end("linspace", last, self.config.num_train_timesteps, steps)
        return self._over(times, steps, self.mu(flow))

    def run_timesteps(self, timesteps: Doubles) -> DPMSinglestepSampling:
        """Return a run over timesteps of a call."""
        check_not_spread(self.config)
        return self._over(whole(timesteps, self.config).astype(np.float64), len(timesteps))

    def _over(self, times: Doubles, steps: int, mu: float | None = None) -> DPMSinglestepSampling:
        config, alphas = self.config, self.alphas_cumprod
        spaced, levels = noise_levels(config, alphas, times, steps, mu=mu)
        end = sigma_table(alphas)[0] if config.final_sigmas_type == "sigma_min" else 0
        return DPMSinglestepSampling(orders(config, steps), *scheduled(config, spaced, levels, end), config)


class DPMSinglestepSampling(DPMSampling):
    """One run of the singlestep DPM-Solver."""

    config: DPMSinglestepOptions

    def __init__(self, orders: list[int], *schedule: Any) -> None:
        super().__init__(*schedule)
        self._orders = orders
        self._history: list[Array] = []
        self._start: Array | None = None

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents at the next noise level. Raises ValueError out of order."""
        self.turns.take(index)
        kept = self.config.solver_order
        self._history = [*self._history[-kept:], self.predicted(output, latents, index)][-kept:]
        order = min(self._orders[index], len(self._history))
        if order == 1:
            self._start = latents.copy()
        assert self._start is not None
        weights = Weights(self, index + 1 - order, index + 1)
        noise = self.drawn(self._history[-1], rng)
        return self.moved(self._start, weights, self._terms(weights, index, order), noise)

    def _terms(self, weights: Weights, index: int, order: int) -> list[tuple[np.float32, Array]]:
        if order == 1:
            return [(weights.first, self._history[-1])]
        begin = index + 1 - order
        oldest = self._history[-order]
        reach = (self.lambdas[index] - self.lambdas[begin]) / weights.h
        slope = (self._history[-1] - oldest) / reach
        midpoint = self.config.solver_type == "midpoint"
        if order == 2:
            return [(weights.first, oldest), (weights.half if midpoint else weights.second, slope)]
        if midpoint:
            return [(weights.first, oldest), (weights.second, slope)]
        near = (self.lambdas[begin + 1] - self.lambdas[begin]) / weights.h
        early = (self._history[-2] - oldest) / near
        bend = (slope - early) * (2 / (reach - near))
        slope = (early * reach - slope * near) / (reach - near)
        return [(weights.first, oldest), (weights.second, slope), (weights.third, bend)]


def orders(config: DPMSinglestepOptions, steps: int) -> list[int]:
    """Return the order of each step: 1, 2, ... in groups; the last group is cut where it must be."""
    order = config.solver_order
    group = list(range(1, order + 1))
    if not config.lower_order_final and steps % order == 0 and config.final_sigmas_type != "zero":
        return group * (steps // order)
    if order == 1:
        return [1] * steps
    # The last step is of order 1, and so is, or stays below the full order, what is left of the last group.
    whole, left = divmod(steps, order)
    last = group[:left] if left else [*group[: order - 1], 1]
    result = group * (whole if left else whole - 1) + last
    if config.final_sigmas_type == "zero":
        result[-1] = 1
    return result
