"""UniPC in numpy: a multistep prediction, corrected by the network's next answer at no further call.

Source of the method: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models" (2023), algorithms 1 to 4; the numbers are those of `diffusers.UniPCMultistepScheduler`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ovforge.contracts import FlowRun, RandomStream
from ovforge_sampling import ONE, Array, expm1, refuse, takes_none
from ovforge_schedulers.flow import given, shifted, static_shift, stretched
from ovforge_schedulers.runs import SolverSampling
from ovforge_schedulers.solvers import (
    SolverScheduler,
    SpacedSolverOptions,
    check_spreads,
    instead_of,
    noise_levels,
    scheduled,
)
from ovforge_schedulers.spacing import Doubles, sigma_table, spaced_before_end

__all__ = ["UniPCOptions", "UniPCSampling", "UniPCScheduler"]

TINY = 1e-6


class UniPCOptions(SpacedSolverOptions):
    """Options of diffusers' UniPCMultistepScheduler, but `solver_p`, another scheduler."""

    original: ClassVar[str] = "UniPCMultistepScheduler"

    predict_x0: bool = True
    solver_type: Annotated[Literal["bh1", "bh2"], instead_of({"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"})] = (
        "bh2"
    )
    disable_corrector: tuple[int, ...] = ()
    solver_p: Any = Field(None, description="not here: another scheduler of diffusers' as the predictor")
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    shift_terminal: float | None = Field(None, ge=0, lt=1)


class UniPCScheduler(SolverScheduler[UniPCOptions]):
    """UniPC: one call of the network a step."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        check_spreads(self.config, with_flow=("use_karras_sigmas",))
        if self.config.solver_p is not None:
            raise refuse(self.config, "solver_p", "another scheduler as the predictor is not known here")
        if self.config.shift_terminal is not None and not self.config.use_flow_sigmas:
            what = "shift_terminal is for flows"
            raise refuse(self.config, "shift_terminal", what, "Set use_flow_sigmas = true, or leave it out.")
        if not self.config.lower_order_final and self.config.solver_order > (
            1 if self.config.final_sigmas_type == "zero" else 2
        ):
            what = "lower_order_final = false divides by zero at the last step"
            raise refuse(self.config, "lower_order_final", what, "Set lower_order_final = true.")
        if not self.config.predict_x0 and self.config.final_sigmas_type == "zero":
            what = "predict_x0 = false cannot end at a noise level of zero"
            raise refuse(self.config, "predict_x0", what, "Set final_sigmas_type = 'sigma_min', or predict_x0 = true.")
        if not self.config.predict_x0 and self.config.prediction_type == "flow_prediction":
            what = "predict_x0 = false has no way to predict noise from a flow"
            raise refuse(self.config, "predict_x0", what, "Set predict_x0 = true.")

    needs_mu = True
    shifts_in_lines = True

    def run(self, steps: int, flow: FlowRun | None = None) -> UniPCSampling:
        """Return a run from the first step on."""
        config, train = self.config, self.config.num_train_timesteps
        if flow is not None and (flow.timesteps is not None or (flow.sigmas is not None and config.use_karras_sigmas)):
            self.without_levels(flow)
        if config.use_dynamic_shifting and not config.use_flow_sigmas:
            what = "use_dynamic_shifting is for flows"
            raise refuse(config, "use_dynamic_shifting", what, "Set use_flow_sigmas = true, or leave it out.")
        mu = self.mu(flow)
        times = spaced_before_end(config.timestep_spacing, train, train, steps, config.steps_offset)
        spaced, levels = noise_levels(config, self.alphas_cumprod, times, steps)
        if config.use_flow_sigmas:
            levels = levels / (levels + 1) if config.use_karras_sigmas else self._flow(steps, flow, mu)
            spaced = levels * train
        end: Any = 0
        if config.final_sigmas_type == "sigma_min":
            end = sigma_table(self.alphas_cumprod)[0] if spaced is times else levels[-1]
        return UniPCSampling(*scheduled(config, spaced, levels, end), config)

    def run_sigmas(self, sigmas: Doubles) -> UniPCSampling:
        """Return a run over a flow's shares of noise, of a call."""
        if not self.config.use_flow_sigmas:
            raise takes_none(self.config, "sigmas", " without use_flow_sigmas")
        return self.run(len(sigmas), FlowRun(sigmas=sigmas.tolist()))

    def _flow(self, steps: int, flow: FlowRun | None, mu: float | None) -> Doubles:
        """Return the shares of noise of a flow, shifted to more noise, and stretched to end at `shift_terminal`."""
        config = self.config
        own = np.linspace(1, 1 / config.num_train_timesteps, steps + 1)[:-1]
        shares = own if flow is None or flow.sigmas is None else given(flow.sigmas, steps, "sigmas")
        shares = static_shift(shares, config.flow_shift) if mu is None else shifted(shares, mu, config.time_shift_type)
        if config.shift_terminal:
            shares = stretched(shares, config.shift_terminal)
        if abs(shares[0] - 1) < TINY:
            shares[0] -= TINY  # a first share of 1 has no logarithm
        return np.asarray(shares)


class UniPCSampling(SolverSampling):
    """One run of UniPC."""

    config: UniPCOptions

    def __init__(self, *schedule: Any) -> None:
        super().__init__(*schedule)
        self._history: list[Array] = []
        self._start: Array | None = None
        self._order = 0

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Correct the last step by what the network says now, and predict the next. Raises ValueError out of order."""
        taken = self.turns.take(index)
        newest = self._predicted(output, latents, index)
        if taken and index - 1 not in self.config.disable_corrector:
            latents = self._corrected(newest, index)
        kept = self.config.solver_order
        self._history = [*self._history, newest][-kept:]
        left = len(self.timesteps) - index if self.config.lower_order_final else kept
        self._order = min(kept, left, taken + 1)
        self._start = latents.copy()
        step = _Step(self, index, index + 1, self._order)
        slopes = self._slopes(step)
        shares = [np.float32(0.5)] if self._order == 2 else step.solve(self._order - 1)
        return step.moved(latents, newest, zip(shares, slopes, strict=True))

    def _corrected(self, newest: Array, index: int) -> Array:
        """Return the latents of this step anew, with its own prediction as one more point."""
        assert self._start is not None
        step = _Step(self, index - 1, index, self._order)
        slopes = [*self._slopes(step), newest - self._history[-1]]
        shares = [np.float32(0.5)] if self._order == 1 else step.solve(self._order)
        return step.moved(self._start, self._history[-1], zip(shares, slopes, strict=True))

    def _slopes(self, step: _Step) -> list[Array]:
        """Return the differences of older predictions to the one that a step begins with, by distance."""
        begin = self._history[-1]
        return [(older - begin) / ratio for older, ratio in zip(self._history[-2::-1], step.ratios[:-1], strict=False)]

    def _predicted(self, output: Array, latents: Array, index: int) -> Array:
        return (self.clean if self.config.predict_x0 else self.predicted_noise)(output, latents, index)


class _Step:
    """The weights of one step, from level `begin` to `end` by `order` points (equations 5 to 12)."""

    def __init__(self, run: UniPCSampling, begin: int, end: int, order: int) -> None:
        config, lambdas = run.config, run.lambdas
        h = lambdas[end] - lambdas[begin]
        past = [(lambdas[begin - back] - lambdas[begin]) / h for back in range(1, order)]
        self.ratios = np.array([*past, ONE], dtype=np.float32)
        self._order = order
        self._signed = -h if config.predict_x0 else h
        grown = expm1(self._signed)
        self._base = self._signed if config.solver_type == "bh1" else grown
        scale = run.alpha[end] if config.predict_x0 else run.sigma[end]
        kept = run.sigma if config.predict_x0 else run.alpha
        self._carry = kept[end] / kept[begin]
        self._first, self._rest = scale * grown, scale * self._base
        self._grown = grown

    def solve(self, count: int) -> list[np.float32]:
        """Return the weights of `count` differences; none for none."""
        if not count:
            return []
        signed = self._signed
        phi, factorial, right = self._grown / signed - ONE, 1, []
        for power in range(1, count + 1):
            right.append(phi * factorial / self._base)
            factorial *= power + 1
            phi = phi / signed - np.float32(1 / factorial)
        powers = np.stack([self.ratios[:count] ** power for power in range(count)])
        return list(np.linalg.solve(powers, np.array(right, dtype=np.float32)))

    def moved(self, latents: Array, begin: Array, terms: Iterable[tuple[np.float32, Array]]) -> Array:
        """Return carry * latents - first * begin - rest * (the weighted terms)."""
        moved: Array = latents * self._carry
        moved -= begin * self._first
        for weight, term in terms:
            moved -= term * (self._rest * weight)
        return moved
